/* C[m][16 panels] (+)= X[m][k] W  for W in panels of 16 columns, every format of formats.h.
 *
 * A tile is up to FC_MR rows by FC_NV vectors of accumulators in registers. A line of W, 64 bytes, is taken apart into
 * vectors whose lanes are columns (PARTS of them, in the order of k), and each row adds its values to them:
 *
 *     format     acc +=                             x                           parts of a line
 *     f32        x[k] w[k]                          float32                     k
 *     bf16       x[k] w[k] + x[k+1] w[k+1]          bfloat16 pairs              both at once, or, without the unit,
 *                                                   float32 (rounded)           k, k+1
 *     s8         x[k] w[k] + x[k+1] w[k+1],         int16 pairs                 both at once; a line is 32 bytes
 *                w signed bytes
 *     u8         sum of 4 x[k] u[k]                 int8                        all at once, or, without the unit,
 *                                                   int16, order 0 2 1 3        k 0 2, k 1 3
 *     u4, u6     the same, of small u               int8, or int16 as above     all at once, or as u8
 *     i4         the same                           int8, or int16 as above     low nibbles k 0..3, high nibbles k 4..7
 *
 * float formats: an output is one chain over k in order. Integer formats: the sum over a chunk of k is exact, on every
 * ISA the same, and then, chunk by chunk, with X the sum over q, see fc_chunk and fc_rounding,
 *     c += (sum - zero X) (x's scale * W's scale)      and, with minima, before a group's first chunk,
 *     c += (sum over the group of x's scale X) minimum
 * s8:  c = sum over all lines, which must fit. One row runs the arithmetic of many, hence the same bits.
 * C is written in whole panels. Nothing is read beyond row m - 1 and panel panels - 1.
 *
 * While the rows of X pass over a block of W, the bytes after it are prefetched, so that memory and arithmetic overlap.
 */

#define FC_PER_PANEL (FC_PANEL / FC_N)
#if FC_BYTES == 64 || !defined(__x86_64__)
enum { FC_MR = 6, FC_NV = 4, FC_NV_FEW = 4 }; /* 32 registers: 24 accumulators, 4 of W, 1 of x */
#elif FC_BYTES == 32
enum { FC_MR = 6, FC_NV = 2, FC_NV_FEW = 4 }; /* 16 registers: 12 accumulators, 2 of W, 1 of x, 1 product */
#else
enum { FC_MR = 4, FC_NV = 2, FC_NV_FEW = 4 }; /* 16 registers, and SSE multiplies need a copy */
#endif
enum { FC_PASS_ROWS = FC_BYTES > 16 ? 8 : FC_MR }; /* of integers that pass over W at once, in tiles of fewer columns */
/* Of each panel of W under all rows at once. 16 registers hold one panel's columns, which then stay in L1; with 32 the
 * four panels of a tile stay in L2, and x in L1. */
#define FC_PANEL_BYTES (FC_BYTES == 64 ? 32768 : 16384)

#define FC_COMMON_BLOCKS(passing)                                                                                      \
    {.tile_rows = FC_MR, .pass_rows = passing, .panel_bytes = FC_PANEL_BYTES, .rows = 192, .l2_quarters = 2,           \
     .rows_in_place = 24, .many_rows = 48, .few_panels = 4, .many_panels = 16}
#ifdef FC_HAS_TILES
#define FC_BLOCKS                                                                                                      \
    {[0 ... FC_A_TYPES - 1] = FC_COMMON_BLOCKS(FC_MR),                                                                 \
     [FC_A_BF16] = {.tile_rows = 32, .pass_rows = 32, .panel_bytes = 16384, .rows = 512, .l2_quarters = 3,             \
                    .rows_in_place = 2, .many_rows = 48, .few_panels = 4, .many_panels = 32},                          \
     [FC_A_I8] = {.tile_rows = FC_MR, .pass_rows = FC_PASS_ROWS, .panel_bytes = 8192, .rows = 256, .l2_quarters = 2,   \
                  .rows_in_place = 2, .many_rows = 48, .few_panels = 4, .many_panels = 32}}
#else
#define FC_BLOCKS                                                                                                      \
    {[0 ... FC_A_TYPES - 1] = FC_COMMON_BLOCKS(FC_MR), [FC_A_I8] = FC_COMMON_BLOCKS(FC_PASS_ROWS)}
#endif
/* W that is not packed is 512 KiB at a time, streamed 256 KiB. */
#define FC_UNPACKED                                                                                                    \
    {.k = 512, .expanded_k = 512, .unexpanded_rows = FC_BYTES > 16 ? 12 : 1, .stream_rows = 4,                         \
     .stream_columns = 1024, .stream_k = 64}

#ifdef FC_HAS_TILES
#define FC_BF16_X FC_BF16
enum { BF16_PARTS = 1, FC_BF16_K = 32 };
#elif defined(FC_HAS_BF16_DOT)
#define FC_BF16_X FC_BF16
enum { BF16_PARTS = 1, FC_BF16_K = 2 };
#else
#define FC_BF16_X FC_F32
enum { BF16_PARTS = 2, FC_BF16_K = 1 };
#endif
#ifdef FC_HAS_I8_DOT
enum { FC_I8_X = 1, FC_I4_X = 1 };
#elif defined(FC_HAS_MADDUBS)
enum { FC_I8_X = 2, FC_I4_X = 1 };
#else
enum { FC_I8_X = 2, FC_I4_X = 2 };
#endif

#ifdef FC_HAS_TILES
enum { FC_X_ALIGN = FC_LINE }; /* a row of a tile that lies in two lines takes two loads */
#else
enum { FC_X_ALIGN = 4 };
#endif

typedef const struct fc_format *gemm_format; /* a constant wherever it is used: its row is read by the compiler */

/* Bytes of a line that make one vector. */
FC_INLINE ptrdiff_t vector_bytes(gemm_format f) { return FC_BYTES * fc_line_bytes(f) / FC_LINE; }

/* Lines of bytes that formats of fewer bits expand to: FC_TO_U4, FC_TO_U6 */
static const struct fc_format gemm_lines_u4 = {"lines of u4", 1, 8, 4, FC_ANY_GROUP, 1, 4, 0, 0, FC_A_I8, FC_TO_U4, 0},
                              gemm_lines_u6 = {"lines of u6", 1, 8, 4, FC_ANY_GROUP, 1, 4, 0, 0, FC_A_I8, FC_TO_U6, 0};

/* Bytes of an integer of x, and parts of a line */
FC_INLINE int int_x_bytes(gemm_format f) {
    return f->a_type == FC_A_I16 ? 2 : f->bits == 4 || f->expands ? FC_I4_X : FC_I8_X;
}
FC_INLINE int parts_of(gemm_format f) {
    return f->a_type == FC_A_F32 ? 1 : f->a_type == FC_A_BF16 ? BF16_PARTS : f->k_step * int_x_bytes(f) / 4;
}

/* Vector j of the tile's columns inside a line. */
FC_INLINE const char *line_of(gemm_format f, const char *w, ptrdiff_t panel_stride, int j) {
    return w + j / FC_PER_PANEL * panel_stride + j % FC_PER_PANEL * vector_bytes(f);
}

/* Prefetches a share of the block of W that comes after this one: each row tile for another part, line by line, into
 * L2. A tile that is alone reads as fast as memory gives, and fetches what it needs next: against s8 further away,
 * since between its products and the next ones a row of weights takes longer than the bytes it is for. */
FC_INLINE ptrdiff_t next_bytes(gemm_format f) { return f->a_type == FC_A_I16 ? 8192 : 2048; }
typedef struct {
    const char *at;
    ptrdiff_t step;
    int one; /* panel */
} gemm_prefetch;

FC_INLINE gemm_prefetch prefetch_from(gemm_format f, const char *w, ptrdiff_t bytes, int tile, int tiles) {
    const ptrdiff_t ahead = tiles == 1 ? next_bytes(f) : bytes + bytes / tiles * tile;
    return (gemm_prefetch){w + ahead, fc_line_bytes(f) / tiles, 0};
}

FC_INLINE void prefetch_line(gemm_prefetch *a, const int nv, ptrdiff_t panel_stride) {
    if (!a) return;
    if (a->one) {
        __builtin_prefetch(a->at, 0, 2);
    } else {
#pragma GCC unroll 4
        for (int j = 0; j < nv; j += FC_PER_PANEL)
            __builtin_prefetch(line_of(&fc_formats[FC_PACKED_F32], a->at, panel_stride, j), 0, 2);
    }
    a->at += a->step;
}

/* Lines that a tile among many takes in one turn of its loop: counting takes ports that multiply-adds need, and asking
 * again for what was asked for takes those of loads, a cycle a line each. */
enum { LINES_AT_ONCE = 4 };

/* The same for so many lines. Where there are tiles enough, each has a part of one panel, and asks for hardly a line
 * twice. */
FC_INLINE gemm_prefetch prefetch_lines_from(gemm_format f, const int nv, const char *w, ptrdiff_t panel_stride,
                                            ptrdiff_t bytes, int tile, int tiles) {
    const int panels = (nv + FC_PER_PANEL - 1) / FC_PER_PANEL, one = tiles >= LINES_AT_ONCE * panels;
    const int parts = one ? tiles / panels : tiles, part = one ? tile / panels : tile;
    const char *panel = one ? w + tile % panels * panel_stride : w;
    gemm_prefetch prefetch = prefetch_from(f, panel, bytes, part, parts);
    prefetch.step = LINES_AT_ONCE * fc_line_bytes(f) / parts;
    prefetch.one = one;
    return prefetch;
}

FC_INLINE const char *first_line(gemm_format f, const struct fc_gemm *g, ptrdiff_t vector) {
    return (const char *)g->w + vector / FC_PER_PANEL * g->panel_stride + vector % FC_PER_PANEL * vector_bytes(f);
}

/* ---- float formats ---- */

FC_INLINE vf float_part(gemm_format f, int part, const char *line) {
    if (f->a_type == FC_A_F32 || BF16_PARTS == 1) return vf_load(line);
    vu pair = (vu)vf_load(line);
    return (vf)(part == 0 ? pair << 16 : pair & 0xffff0000u);
}

FC_INLINE vf float_step(gemm_format f, vf acc, vf w, const char *x) {
#ifdef FC_HAS_BF16_DOT
    if (f->a_type == FC_A_BF16) {
        uint32_t pair;
        memcpy(&pair, x, 4);
        return vf_dot_bf16(acc, (vu)w, (vu){0} + pair);
    }
#endif
    (void)f;
    return vf_add_product(acc, vf_load1(x), w);
}

/* acc += one line of every row */
FC_INLINE void float_line(gemm_format f, const int mr, const int nv, vf acc[][FC_NV_FEW], const char *x, ptrdiff_t ldx,
                          const char *w, ptrdiff_t panel_stride) {
    const int parts = parts_of(f);
#pragma GCC unroll 2
    for (int part = 0; part < parts; part++) {
        const char *line = parts > 1 ? opaque(w) : w;
        vf wv[FC_NV_FEW];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) wv[j] = float_part(f, part, line_of(f, line, panel_stride, j));
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++)
                acc[i][j] = float_step(f, acc[i][j], wv[j], x + i * ldx + 4 * part);
    }
}

FC_INLINE void float_tile(gemm_format f, const int mr, const int nv, const struct fc_gemm *g, ptrdiff_t row,
                          ptrdiff_t vector, int tile, int tiles) {
    const int parts = parts_of(f);
    const ptrdiff_t ldx = g->ldx, ldc = g->ldc, panel_stride = g->panel_stride;
    char *c = (char *)g->c + row * ldc + vector * FC_BYTES;
    const char *x = (const char *)g->x + row * ldx, *w = first_line(f, g, vector);
    const ptrdiff_t line_bytes = fc_line_bytes(f), bytes = g->lines * line_bytes;
    vf acc[FC_MR][FC_NV_FEW];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) acc[i][j] = g->accumulate ? vf_load(c + i * ldc + j * FC_BYTES) : vf_zero();
    ptrdiff_t lines = g->lines;
    if (tiles >= LINES_AT_ONCE) {
        gemm_prefetch prefetch = prefetch_lines_from(f, nv, w, panel_stride, bytes, tile, tiles);
        for (; lines >= LINES_AT_ONCE; lines -= LINES_AT_ONCE) {
            prefetch_line(&prefetch, nv, panel_stride);
#pragma GCC unroll 4
            for (int line = 0; line < LINES_AT_ONCE; line++)
                float_line(f, mr, nv, acc, x + 4 * parts * line, ldx, w + line_bytes * line, panel_stride);
            x += 4 * parts * LINES_AT_ONCE;
            w += line_bytes * LINES_AT_ONCE;
        }
    }
    gemm_prefetch prefetch = prefetch_from(f, w, bytes, tile, tiles);
    for (; lines > 0; lines--, x += 4 * parts, w += line_bytes) {
        prefetch_line(&prefetch, nv, panel_stride);
        float_line(f, mr, nv, acc, x, ldx, w, panel_stride);
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) vf_store(c + i * ldc + j * FC_BYTES, acc[i][j]);
}

/* ---- integer formats ---- */

FC_INLINE vi int_part_of(gemm_format f, int part, vu w) {
    const int wide = int_x_bytes(f) == 2;
    if (f->bits == 4) w = ((wide ? part / 2 : part) == 0 ? w : w >> 4) & 0x0f0f0f0fu;
    if (!wide) return (vi)w;
    return part % 2 == 0 ? (vi)(w & 0x00ff00ffu) : (vi)((vu16)w >> 8);
}

FC_INLINE vi int_part(gemm_format f, int part, const char *line) {
    if (f->a_type == FC_A_I16) return vi_from_s8((const int8_t *)line);
    return int_part_of(f, part, (vu)vf_load(line));
}

/* Products that maddubs makes are summed in 16 bits first, a chunk in so many parts that each fits: of nibbles 8 of at
 * most 2 * 15 * 127. 0: there are no such sums. */
FC_INLINE int short_sums(gemm_format f) {
#if defined(FC_HAS_MADDUBS) && !defined(FC_HAS_I8_DOT)
    if (f->bits == 4 || f->expands == FC_TO_U4) return 1;
    if (f->expands == FC_TO_U6) return 2;
#endif
    (void)f;
    return 0;
}

FC_INLINE vi int_step(gemm_format f, vi acc, vi w, const char *x) {
    int32_t four;
    memcpy(&four, x, 4);
    vi xv = (vi){0} + four;
#ifdef FC_HAS_I8_DOT
    if (f->a_type == FC_A_I16) return vi_dot_i16(acc, w, xv);
    return vi_dot_i8(acc, w, xv);
#else
    if (f->a_type == FC_A_I16) return acc + vi_madd16(w, xv); /* here gcc orders them well by itself */
#ifdef FC_HAS_MADDUBS
    if (short_sums(f)) return vi_add_maddubs(acc, w, xv);
#endif
    (void)f;
    return vi_add_madd16(acc, w, xv);
#endif
}

/* The first of a sum in 16 bits */
FC_INLINE vi int_first(vi w, const char *x) {
    int32_t four;
    memcpy(&four, x, 4);
#ifdef FC_HAS_MADDUBS
    return vi_maddubs(w, (vi){0} + four);
#else
    return w + four; /* there are none */
#endif
}

/* acc += one line of every row, for products of bytes with bytes: gcc finds registers for one vector of it after the
 * other, with x broadcast anew, but not for all of them at once. */
FC_INLINE void byte_line(gemm_format f, const int mr, const int nv, vi acc[][FC_NV_FEW], const char *x, ptrdiff_t ldx,
                         const char *w, ptrdiff_t panel_stride) {
#pragma GCC unroll 8
    for (int j = 0; j < nv; j++) {
        const char *again = opaque(x);
        const vi u = int_part(f, 0, line_of(f, w, panel_stride, j));
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) acc[i][j] = int_step(f, acc[i][j], u, again + i * ldx);
    }
}

/* acc += `lines` lines of every row */
FC_INLINE void int_lines(gemm_format f, const int mr, const int nv, vi acc[][FC_NV_FEW], const char *x, ptrdiff_t ldx,
                         const char *w, ptrdiff_t panel_stride, ptrdiff_t lines, gemm_prefetch *prefetch) {
    const int parts = parts_of(f);
    for (; lines > 0; lines--, x += 4 * parts, w += fc_line_bytes(f)) {
        prefetch_line(prefetch, nv, panel_stride);
        if (f->expands) {
            byte_line(f, mr, nv, acc, x, ldx, w, panel_stride);
            continue;
        }
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            const char *line = parts > 1 ? opaque(w) : w;
            vi wv[FC_NV_FEW];
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) wv[j] = int_part(f, part, line_of(f, line, panel_stride, j));
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
                for (int j = 0; j < nv; j++)
                    acc[i][j] = int_step(f, acc[i][j], wv[j], x + i * ldx + 4 * part);
        }
    }
}

/* Scales of a tile's columns, or (which 1, float16) minima or the second group's scales; line: of its first panel */
FC_INLINE void int_scales(gemm_format f, const int nv, vf scale[], int which, const char *line, ptrdiff_t panel_stride,
                          ptrdiff_t in_line) {
#pragma GCC unroll 8
    for (int j = 0; j < nv; j++) {
        const char *at = line + j / FC_PER_PANEL * panel_stride;
        const ptrdiff_t lane = in_line / 4 + j % FC_PER_PANEL * FC_N;
        if (f->scale_bytes == 4) scale[j] = vf_load(at + lane * 4);
        else scale[j] = vf_from_f16((const uint16_t *)(const void *)at + which * FC_PANEL + lane);
    }
}

/* x after a chunk's integers: what fc_chunk says of row i */
FC_INLINE const struct fc_chunk *chunk_of_row(const char *end, ptrdiff_t ldx, int i) {
    return (const struct fc_chunk *)(const void *)(end + i * ldx);
}

/* acc = start + sum of u q over a chunk of k; with two planes  q = 128 h + l. One row takes both in one pass over W.
 * The second pass is for the other plane, or for the other half of the lines. */
FC_INLINE void int_chunk(gemm_format f, const int two, const int mr, const int nv, vi acc[][FC_NV_FEW],
                         const vi start[FC_PASS_ROWS], const char *x, ptrdiff_t ldx, const char *w,
                         ptrdiff_t panel_stride, ptrdiff_t lines, gemm_prefetch *prefetch) {
    const int shorts = short_sums(f), both = two && mr == 1, second = shorts == 2 || (two && !both);
    const ptrdiff_t plane = lines * f->k_step, pass = shorts == 2 ? lines / 2 : lines;
    const vi none = {0}, ones = none + 0x00010001;
    vi high[FC_PASS_ROWS][FC_NV_FEW];
#pragma GCC unroll 8
    for (int i = 0; i < mr + both; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) acc[i][j] = shorts || two ? none : start[i];
    int_lines(f, mr + both, nv, acc, x, both ? plane : ldx, w, panel_stride, pass, prefetch);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            if (shorts) acc[i][j] = vi_add_madd16(two ? none : start[i], acc[i][j], ones);
            if (two) acc[i][j] = (acc[i][j] << 7) + start[i];
            if (both) acc[i][j] = shorts ? vi_add_madd16(acc[i][j], acc[i + 1][j], ones) : acc[i][j] + acc[i + 1][j];
            if (second && shorts) {
                high[i][j] = acc[i][j], acc[i][j] = none;
                __asm__("" : "+m"(high[i][j])); /* no register is left for it */
            }
        }
    if (!second) return;
    if (shorts == 2)
        int_lines(f, mr, nv, acc, x + pass * f->k_step, ldx, w + pass * FC_LINE, panel_stride, pass, prefetch);
    else int_lines(f, mr, nv, acc, x + plane, ldx, w, panel_stride, lines, NULL);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            if (shorts) acc[i][j] = vi_add_madd16(high[i][j], acc[i][j], ones);
}

/* y += acc (x's scale * W's);  y (mr, nv vectors), end: of a chunk's integers */
FC_INLINE void add_chunk(const int mr, const int nv, vf y[][FC_NV_FEW], vi acc[][FC_NV_FEW], const vf scale[],
                         const char *end, ptrdiff_t ldx) {
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        const vf x_scale = vf_load1(&chunk_of_row(end, ldx, i)->scale);
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) y[i][j] = vf_fma(vf_from_int(acc[i][j]), x_scale * scale[j], y[i][j]);
    }
}

/* y += (sum of x over the group that begins with this chunk) min */
FC_INLINE void add_minima(const int mr, const int nv, vf y[][FC_NV_FEW], const vf min[], const char *end,
                          ptrdiff_t ldx) {
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        const vf sum = vf_load1(&chunk_of_row(end, ldx, i)->sum);
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) y[i][j] = vf_fma(sum, min[j], y[i][j]);
    }
}

/* C's tile to y, or back */
FC_INLINE void move_tile(const int mr, const int nv, vf y[][FC_NV_FEW], char *c, ptrdiff_t ldc, int back) {
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            if (back) vf_store(c + i * ldc + j * FC_BYTES, y[i][j]);
            else y[i][j] = c ? vf_load(c + i * ldc + j * FC_BYTES) : vf_zero();
        }
}

FC_INLINE void chunks_tile(gemm_format f, const int two, const int mr, const int nv, const struct fc_gemm *g,
                           ptrdiff_t row, ptrdiff_t vector, int tile, int tiles) {
    const int nibbles = f->bits == 4, minima = nibbles ? f->minimum_bytes > 0 : g->minima;
    const ptrdiff_t lines = nibbles ? FC_CHUNK / f->k_step : g->lines, plane = lines * f->k_step * int_x_bytes(f);
    const ptrdiff_t group_chunks = f->block_groups > 1 ? f->group / FC_CHUNK : g->group_chunks;
    const ptrdiff_t chunks = group_chunks * f->block_groups, ldx = g->ldx, panel_stride = g->panel_stride;
    const ptrdiff_t min_line = !nibbles && minima, block = (chunks * lines + 1 + min_line) * FC_LINE;
    const ptrdiff_t integers = plane * (1 + two), x_step = fc_chunk_bytes(integers, FC_X_ALIGN);
    const ptrdiff_t in_line = vector % FC_PER_PANEL * FC_BYTES;
    char *c = (char *)g->c + row * g->ldc + vector * FC_BYTES;
    const char *x = (const char *)g->x + row * ldx, *w = first_line(f, g, vector);
    gemm_prefetch prefetch = prefetch_from(f, w, g->blocks * block, tile, tiles);
    const int in_memory = mr > 1 || (two && FC_BYTES < 64); /* the registers are for acc */
    vf local[FC_PASS_ROWS][FC_NV_FEW], (*y)[FC_NV_FEW] = local;
    move_tile(mr, nv, y, g->accumulate ? c : NULL, g->ldc, 0);
    for (ptrdiff_t blocks = g->blocks; blocks > 0; blocks--, w += block)
        for (ptrdiff_t chunk = 0; chunk < chunks; chunk++, x += x_step) {
            const int which = f->block_groups > 1 ? (int)(chunk / group_chunks) : 0;
            const char *end = x + integers, *line = w - in_line + chunks * lines * FC_LINE;
            vi acc[FC_PASS_ROWS + 1][FC_NV_FEW], start[FC_PASS_ROWS];
            vf scale[FC_NV_FEW];
            if (in_memory) __asm__ volatile("" : "+r"(y));
            if (minima && chunk == 0) {
                int_scales(f, nv, scale, 1, line + min_line * FC_LINE, panel_stride, in_line);
                add_minima(mr, nv, y, scale, end, ldx);
            }
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) start[i] = (vi){0} + chunk_of_row(end, ldx, i)->start;
            int_chunk(f, two, mr, nv, acc, start, x, ldx, w + chunk * lines * FC_LINE, panel_stride, lines, &prefetch);
            int_scales(f, nv, scale, which, line, panel_stride, in_line);
            if (in_memory) __asm__ volatile("" : "+r"(y));
            add_chunk(mr, nv, y, acc, scale, end, ldx);
            if (chunk == chunks - 1) prefetch_line(&prefetch, nv, panel_stride); /* scales are a line as well */
        }
    move_tile(mr, nv, y, c, g->ldc, 1);
}

FC_INLINE void int_tile(gemm_format f, const int mr, const int nv, const struct fc_gemm *g, ptrdiff_t row,
                        ptrdiff_t vector, int tile, int tiles) {
    chunks_tile(f, 0, mr, nv, g, row, vector, tile, tiles);
}

FC_INLINE void planes_tile(gemm_format f, const int mr, const int nv, const struct fc_gemm *g, ptrdiff_t row,
                           ptrdiff_t vector, int tile, int tiles) {
    chunks_tile(f, 1, mr, nv, g, row, vector, tile, tiles);
}

FC_INLINE void pair_tile(gemm_format f, const int mr, const int nv, const struct fc_gemm *g, ptrdiff_t row,
                         ptrdiff_t vector, int tile, int tiles) {
    const char *w = first_line(f, g, vector);
    char *c = (char *)g->c + row * g->ldc + vector * FC_BYTES;
    gemm_prefetch prefetch = prefetch_from(f, w, g->lines * fc_line_bytes(f), tile, tiles);
    vi acc[FC_MR][FC_NV_FEW];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) acc[i][j] = (vi){0};
    int_lines(f, mr, nv, acc, (const char *)g->x + row * g->ldx, g->ldx, w, g->panel_stride, g->lines, &prefetch);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) vf_store(c + i * g->ldc + j * FC_BYTES, vf_from_int(acc[i][j]));
}

/* ---- all rows and columns ---- */

/* Each tile is a function of its own: gcc 12 finds registers for one loop, not for sixty in one function. */
typedef void gemm_tile(const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t vector, int tile, int tiles);
#define FC_TILE(name, kind, format, mr, nv)                                                                            \
    static __attribute__((noinline)) void name(const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t vector, int tile,     \
                                               int tiles) {                                                            \
        kind##_tile(format, (mr) < FC_MR ? (mr) : FC_MR, nv, g, row, vector, tile, tiles);                             \
    }
#define FC_TILES(name, kind, format, nv)                                                                               \
    FC_TILE(name##_1, kind, format, 1, nv)                                                                             \
    FC_TILE(name##_2, kind, format, 2, nv)                                                                             \
    FC_TILE(name##_3, kind, format, 3, nv)                                                                             \
    FC_TILE(name##_4, kind, format, 4, nv)                                                                             \
    FC_TILE(name##_5, kind, format, 5, nv)                                                                             \
    FC_TILE(name##_6, kind, format, 6, nv)                                                                             \
    static gemm_tile *const name[] = {NULL, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};

/* As few tiles as the rows fit in, all of nearly the same height: a low one would wait for its own sums. */
FC_INLINE void gemm_columns(gemm_tile *const by_rows[], const struct fc_gemm *g, ptrdiff_t vector) {
    const int tiles = (int)((g->m + FC_MR - 1) / FC_MR);
    for (ptrdiff_t row = 0, rows, t = 0; t < tiles; t++, row += rows) {
        rows = (g->m - row + tiles - t - 1) / (tiles - t);
        by_rows[rows](g, row, vector, (int)t, tiles);
    }
}

/* Panels this short, as those of keys and values are, follow each other in memory: few rows take one at a time, so that
 * memory is read in order. Several would be as many streams, each too short for the processor to fetch ahead. (Not bytes
 * under one row: half a line is too little work for a loop.) */
enum { SHORT_PANEL = 16384 };

/* one row: more columns at a time; all: whole tiles, then (with wide vectors) two panels, then one */
FC_INLINE void gemm_all(gemm_format f, gemm_tile *few, gemm_tile *const all[], gemm_tile *const two[],
                        gemm_tile *const one[], const struct fc_gemm *g) {
    ptrdiff_t v = 0, vectors = g->panels * FC_PER_PANEL;
    const int in_order =
        g->m <= FC_MR && g->panel_stride <= SHORT_PANEL && !g->in_cache && !(f->a_type == FC_A_I16 && g->m == 1);
    const int step = FC_NV < FC_PER_PANEL ? FC_NV : FC_PER_PANEL;
    if (in_order)
        for (; v + step <= vectors; v += step) gemm_columns(one, g, v);
    if (FC_NV_FEW > FC_NV && g->m == 1)
        for (; v + FC_NV_FEW <= vectors; v += FC_NV_FEW) few(g, 0, v, 0, 1);
    for (; v + FC_NV <= vectors; v += FC_NV) gemm_columns(all, g, v);
    for (; v + 2 <= vectors; v += 2) gemm_columns(two, g, v);
    if (v < vectors) gemm_columns(one, g, v);
}

#if FC_BYTES == 64
#define FC_GEMM(name, kind, format)                                                                                    \
    FC_TILES(name##_tile, kind, format, FC_NV)                                                                         \
    FC_TILES(name##_pair, kind, format, 2)                                                                             \
    FC_TILES(name##_single, kind, format, 1)                                                                           \
    static void name(const struct fc_gemm *g) { gemm_all(format, NULL, name##_tile, name##_pair, name##_single, g); }
#else /* a tile's columns are whole panels, or parts of one: nothing is left over */
#define FC_GEMM(name, kind, format)                                                                                    \
    FC_TILES(name##_tile, kind, format, FC_NV)                                                                         \
    FC_TILE(name##_few, kind, format, 1, FC_NV_FEW)                                                                    \
    static void name(const struct fc_gemm *g) {                                                                        \
        gemm_all(format, name##_few, name##_tile, name##_tile, name##_tile, g);                                        \
    }
#endif

FC_GEMM(gemm_f32, float, &fc_formats[FC_PACKED_F32])
#ifndef FC_HAS_TILES
FC_GEMM(gemm_bf16, float, &fc_formats[FC_PACKED_BF16])
#endif
FC_GEMM(gemm_s8, pair, &fc_page_i8)

/* Rows of integers that are a few too many for a tile are one all the same, of fewer columns: else each line of W would
 * be taken apart twice, and memory would rest under the second tile. With two halves of a panel, each asks for half of the
 * next one; a panel that is left over is for two tiles. */
#if FC_BYTES > 16
enum { FC_NV_TALL = FC_BYTES == 64 ? 2 : 1 };
FC_INLINE void gemm_tall(gemm_tile *tall, void (*low)(const struct fc_gemm *), const struct fc_gemm *g) {
    const int parts = FC_NV_TALL < FC_PER_PANEL ? FC_PER_PANEL / FC_NV_TALL : 1;
    ptrdiff_t v = 0, vectors = g->panels * FC_PER_PANEL;
    for (; v + FC_NV_TALL <= vectors; v += FC_NV_TALL) tall(g, 0, v, (int)(v / FC_NV_TALL % parts), parts);
    if (v == vectors) return;
    struct fc_gemm rest = *g;
    rest.panels = 1;
    rest.c += (g->panels - 1) * FC_PANEL;
    rest.w = (const char *)g->w + (g->panels - 1) * g->panel_stride;
    low(&rest);
}
#define FC_TALL_TILE(name, kind, format, mr)                                                                           \
    static __attribute__((noinline)) void name##_##mr(const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t vector,        \
                                                      int tile, int tiles) {                                           \
        kind##_tile(format, mr, FC_NV_TALL, g, row, vector, tile, tiles);                                              \
    }
#define FC_TALL(name, kind, format)                                                                                    \
    FC_TALL_TILE(name##_tall, kind, format, 7)                                                                         \
    FC_TALL_TILE(name##_tall, kind, format, 8)                                                                         \
    static void name##_rows(const struct fc_gemm *g) {                                                                 \
        if (g->m == 8) gemm_tall(name##_tall_8, name, g);                                                              \
        else if (g->m == 7) gemm_tall(name##_tall_7, name, g);                                                         \
        else name(g);                                                                                                  \
    }
#else
#define FC_TALL(name, kind, format)                                                                                    \
    static void name##_rows(const struct fc_gemm *g) { name(g); }
#endif

/* Integer formats: one plane of x, or two. */
#define FC_PLANES_GEMM(name, kind, format)                                                                             \
    FC_GEMM(name##_##kind, kind, format)                                                                               \
    FC_TALL(name##_##kind, kind, format)
#define FC_INT_GEMM(name, format)                                                                                      \
    FC_PLANES_GEMM(name, int, format)                                                                                  \
    FC_PLANES_GEMM(name, planes, format)                                                                               \
    static void name(const struct fc_gemm *g) { (g->planes == 2 ? name##_planes_rows : name##_int_rows)(g); }
#define FC_ONE_GEMM(name, format)                                                                                      \
    FC_PLANES_GEMM(name, int, format)                                                                                  \
    static void name(const struct fc_gemm *g) { name##_int_rows(g); }
#ifdef FC_HAS_I8_DOT
FC_INT_GEMM(gemm_u8, &fc_formats[FC_PACKED_I8])
#else
FC_ONE_GEMM(gemm_u8, &fc_formats[FC_PACKED_I8])
#endif
#if defined(FC_HAS_MADDUBS) && !defined(FC_HAS_I8_DOT)
FC_ONE_GEMM(gemm_u4, &gemm_lines_u4)
FC_ONE_GEMM(gemm_u6, &gemm_lines_u6)
#else
static void gemm_u4(const struct fc_gemm *g) { gemm_u8(g); }
static void gemm_u6(const struct fc_gemm *g) { gemm_u8(g); }
#endif
#if defined(FC_HAS_I8_DOT) || defined(FC_HAS_MADDUBS)
FC_INT_GEMM(gemm_i4_symmetric, &fc_formats[FC_PACKED_I4_SYMMETRIC])
FC_INT_GEMM(gemm_i4_affine, &fc_formats[FC_PACKED_I4_AFFINE])
#else
FC_ONE_GEMM(gemm_i4_symmetric, &fc_formats[FC_PACKED_I4_SYMMETRIC])
FC_ONE_GEMM(gemm_i4_affine, &fc_formats[FC_PACKED_I4_AFFINE])
#endif
