/* C[m][16 panels] (+)= X[m][k] W  for W in panels of 16 columns, every format of formats.h; integers: gemm_integers.h.
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
 * C is written in whole panels. Nothing is read beyond panel panels - 1 and row m - 1, but see rows_of_tiles.
 *
 * While the rows of X pass over a block of W, what comes after it is prefetched, so that memory and arithmetic overlap.
 */

#define FC_PER_PANEL (FC_PANEL / FC_N)
#if FC_BYTES == 64 || !defined(__x86_64__)
enum { FC_MR = 6, FC_NV = 4, FC_NV_FEW = 4 }; /* 32 registers: 24 accumulators, 4 of W, 1 of x */
#elif FC_BYTES == 32
enum { FC_MR = 6, FC_NV = 2, FC_NV_FEW = 4 }; /* 16 registers: 12 accumulators, 2 of W, 1 of x, 1 product */
#else
enum { FC_MR = 4, FC_NV = 2, FC_NV_FEW = 4 }; /* 16 registers, and SSE multiplies need a copy */
#endif
enum { FC_PASS_ROWS = FC_BYTES > 16 ? 8 : FC_MR }; /* that pass over W at once, in tiles of fewer columns */
/* Of each panel of W under all rows at once. 16 registers hold one panel's columns, which then stay in L1; with 32 the
 * four panels of a tile stay in L2, and x in L1. */
#define FC_PANEL_BYTES (FC_BYTES == 64 ? 32768 : 16384)

#define FC_COMMON_BLOCKS                                                                                               \
    {.tile_rows = FC_MR, .pass_rows = FC_PASS_ROWS, .panel_bytes = FC_PANEL_BYTES, .rows = 192, .l2_quarters = 2,      \
     .rows_in_place = 24, .many_rows = 48, .few_panels = 4, .many_panels = 16}
#ifdef FC_HAS_TILES
#define FC_BLOCKS                                                                                                      \
    {[0 ... FC_A_TYPES - 1] = FC_COMMON_BLOCKS,                                                                        \
     [FC_A_BF16] = {.tile_rows = 32, .pass_rows = 32, .panel_bytes = 16384, .rows = 512, .l2_quarters = 3,             \
                    .rows_in_place = 2, .many_rows = 48, .few_panels = 4, .many_panels = 32},                          \
     [FC_A_I8] = {.tile_rows = 16, .pass_rows = FC_PASS_ROWS, .panel_bytes = 8192, .rows = 256, .l2_quarters = 2,      \
                  .rows_in_place = 2, .many_rows = 48, .few_panels = 4, .many_panels = 32}}
#else
#define FC_BLOCKS {[0 ... FC_A_TYPES - 1] = FC_COMMON_BLOCKS}
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

/* Lines of W to come, into L2. */
typedef struct {
    const char *at;
    ptrdiff_t step;
    int one; /* panel */
} gemm_prefetch;

FC_INLINE void prefetch_line(gemm_prefetch *a, const int nv, ptrdiff_t panel_stride) {
    if (!a) return;
    if (nv > FC_PER_PANEL && a->one) {
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

FC_INLINE const char *first_line(gemm_format f, const struct fc_gemm *g, ptrdiff_t vector) {
    return (const char *)g->w + vector / FC_PER_PANEL * g->panel_stride + vector % FC_PER_PANEL * vector_bytes(f);
}

/* A tile that is alone reads as fast as memory gives, and fetches what it needs next: against s8 further away, since
 * between its products and the next ones a row of weights takes longer than the bytes it is for. */
FC_INLINE ptrdiff_t next_bytes(gemm_format f) { return f->a_type == FC_A_I16 ? 8192 : 2048; }

/* For so many lines at once of a tile among `tiles` under the same columns: its share of what these pass over next, of
 * which a panel has so many bytes. Further ahead, much would have left L2 before its turn. Where there are tiles
 * enough, each has a part of one panel, and asks for hardly a line twice. */
FC_INLINE gemm_prefetch prefetch_next(gemm_format f, const int nv, const struct fc_gemm *g, ptrdiff_t vector,
                                      ptrdiff_t bytes, int at_once, int tile, int tiles) {
    if (tiles == 1) return (gemm_prefetch){first_line(f, g, vector) + next_bytes(f), fc_line_bytes(f), 0};
    const int panels = (nv + FC_PER_PANEL - 1) / FC_PER_PANEL, one = panels > 1 && tiles >= at_once * panels;
    const int parts = one ? tiles / panels : tiles, part = one ? tile / panels : tile;
    const ptrdiff_t panel = vector / FC_PER_PANEL + panels;
    const int last = panel + panels > g->panels;
    const char *next = last && g->next_w ? g->next_w : (const char *)g->w + panel * g->panel_stride;
    if (one) next += tile % panels * g->panel_stride;
    return (gemm_prefetch){next + bytes / parts * part, at_once * fc_line_bytes(f) / parts, one};
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
    vf acc[FC_PASS_ROWS][FC_NV_FEW];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) acc[i][j] = g->accumulate ? vf_load(c + i * ldc + j * FC_BYTES) : vf_zero();
    ptrdiff_t lines = g->lines;
    if (tiles >= LINES_AT_ONCE) {
        gemm_prefetch prefetch = prefetch_next(f, nv, g, vector, bytes, LINES_AT_ONCE, tile, tiles);
        for (; lines >= LINES_AT_ONCE; lines -= LINES_AT_ONCE) {
            prefetch_line(&prefetch, nv, panel_stride);
#pragma GCC unroll 4
            for (int line = 0; line < LINES_AT_ONCE; line++)
                float_line(f, mr, nv, acc, x + 4 * parts * line, ldx, w + line_bytes * line, panel_stride);
            x += 4 * parts * LINES_AT_ONCE;
            w += line_bytes * LINES_AT_ONCE;
        }
    }
    /* not the one above: gcc would give the loop above fewer registers (1.4 % of a product) */
    gemm_prefetch prefetch = prefetch_next(f, nv, g, vector, bytes, 1, tile, tiles);
    for (; lines > 0; lines--, x += 4 * parts, w += line_bytes) {
        prefetch_line(&prefetch, nv, panel_stride);
        float_line(f, mr, nv, acc, x, ldx, w, panel_stride);
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) vf_store(c + i * ldc + j * FC_BYTES, acc[i][j]);
}

/* ---- all rows and columns ---- */

/* Each tile is a function of its own: gcc 12 finds registers for one loop, not for sixty in one function. */
typedef void gemm_tile(const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t vector, int tile, int tiles);
#define FC_TILE(name, kind, format, mr, most, nv)                                                                      \
    static __attribute__((noinline)) void name(const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t vector, int tile,     \
                                               int tiles) {                                                            \
        kind##_tile(format, (mr) < (most) ? (mr) : (most), nv, g, row, vector, tile, tiles);                           \
    }
#define FC_TILES(name, kind, format, nv)                                                                               \
    FC_TILE(name##_1, kind, format, 1, FC_MR, nv)                                                                      \
    FC_TILE(name##_2, kind, format, 2, FC_MR, nv)                                                                      \
    FC_TILE(name##_3, kind, format, 3, FC_MR, nv)                                                                      \
    FC_TILE(name##_4, kind, format, 4, FC_MR, nv)                                                                      \
    FC_TILE(name##_5, kind, format, 5, FC_MR, nv)                                                                      \
    FC_TILE(name##_6, kind, format, 6, FC_MR, nv)                                                                      \
    static gemm_tile *const name[] = {NULL, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};

/* Rows that are a few too many for a tile are one all the same, of fewer columns: else each line of W would be taken
 * apart twice, and memory would rest under the second tile. Of two halves of a panel each asks for half of the next. */
enum { FC_NV_TALL = FC_BYTES == 64 ? 2 : 1 };
#define FC_TALL_TILES(name, kind, format)                                                                              \
    FC_TILE(name##_7, kind, format, 7, FC_PASS_ROWS, FC_NV_TALL)                                                       \
    FC_TILE(name##_8, kind, format, 8, FC_PASS_ROWS, FC_NV_TALL)                                                       \
    static gemm_tile *const name[] = {[7] = name##_7, [8] = name##_8};

/* As few tiles as the rows fit in, all of nearly the same height: a low one would wait for its own sums. */
FC_INLINE void gemm_columns(gemm_tile *const by_rows[], const struct fc_gemm *g, ptrdiff_t vector) {
    const int tiles = (int)((g->m + FC_MR - 1) / FC_MR);
    for (ptrdiff_t row = 0, rows, t = 0; t < tiles; t++, row += rows) {
        rows = (g->m - row + tiles - t - 1) / (tiles - t);
        by_rows[rows](g, row, vector, (int)t, tiles);
    }
}

/* Panels this short, as those of keys and values are, follow each other in memory: few rows take one at a time, so that
 * memory is read in order. Several would be as many streams, each too short for the processor to fetch ahead. (Not
 * bytes under one row: half a line is too little work for a loop.) */
enum { SHORT_PANEL = 16384 };

/* Whether tiles of two panels multiply bytes faster than those of four, which use each x for twice as many columns:
 * with one plane of x their sums in float32 find registers. 512 bits of a Zen 5: 1.12 times as fast, else 1.02. */
FC_INLINE int two_panels_are_faster(gemm_format f, const struct fc_gemm *g) {
#ifdef FC_HAS_I8_DOT
    return FC_BYTES == 64 && f->a_type == FC_A_I8 && g->m > FC_MR;
#else
    (void)f, (void)g;
    return 0;
#endif
}

/* one row: more columns at a time; all: whole tiles, then (with wide vectors) two panels, then one */
FC_INLINE void gemm_all(gemm_format f, gemm_tile *few, gemm_tile *const tall[], gemm_tile *const all[],
                        gemm_tile *const two[], gemm_tile *const one[], const struct fc_gemm *g) {
    ptrdiff_t v = 0, vectors = g->panels * FC_PER_PANEL;
    const int in_order =
        g->m <= FC_MR && g->panel_stride <= SHORT_PANEL && !g->in_cache && !(f->a_type == FC_A_I16 && g->m == 1);
    const int step = FC_NV < FC_PER_PANEL ? FC_NV : FC_PER_PANEL;
    const int parts = FC_NV_TALL < FC_PER_PANEL ? FC_PER_PANEL / FC_NV_TALL : 1; /* tall tiles of a panel */
    if (in_order)
        for (; v + step <= vectors; v += step) gemm_columns(one, g, v);
    if (FC_NV_FEW > FC_NV && g->m == 1)
        for (; v + FC_NV_FEW <= vectors; v += FC_NV_FEW) few(g, 0, v, 0, 1);
    /* halves of a short panel of floats take longer than two tiles of a whole one */
    const int tall_too = parts == 1 || f->a_type == FC_A_I8 || g->panel_stride > SHORT_PANEL;
    if (g->m > FC_MR && g->m <= FC_PASS_ROWS && tall_too)
        for (; v + FC_NV_TALL <= vectors; v += FC_NV_TALL) tall[g->m](g, 0, v, (int)(v / FC_NV_TALL % parts), parts);
    if (!two_panels_are_faster(f, g))
        for (; v + FC_NV <= vectors; v += FC_NV) gemm_columns(all, g, v);
    for (; v + 2 <= vectors; v += 2) gemm_columns(two, g, v);
    if (v < vectors) gemm_columns(one, g, v);
}

#if FC_BYTES == 64
#define FC_GEMM(name, kind, format)                                                                                    \
    FC_TILES(name##_tile, kind, format, FC_NV)                                                                         \
    FC_TILES(name##_pair, kind, format, 2)                                                                             \
    FC_TILES(name##_single, kind, format, 1)                                                                           \
    FC_TALL_TILES(name##_tall, kind, format)                                                                           \
    static void name(const struct fc_gemm *g) {                                                                        \
        gemm_all(format, NULL, name##_tall, name##_tile, name##_pair, name##_single, g);                               \
    }
#else /* a tile's columns are whole panels, or parts of one: nothing is left over */
#define FC_GEMM(name, kind, format)                                                                                    \
    FC_TILES(name##_tile, kind, format, FC_NV)                                                                         \
    FC_TILE(name##_few, kind, format, 1, FC_MR, FC_NV_FEW)                                                             \
    FC_TALL_TILES(name##_tall, kind, format)                                                                           \
    static void name(const struct fc_gemm *g) {                                                                        \
        gemm_all(format, name##_few, name##_tall, name##_tile, name##_tile, name##_tile, g);                           \
    }
#endif

FC_GEMM(gemm_f32, float, &fc_formats[FC_PACKED_F32])
#ifndef FC_HAS_TILES
FC_GEMM(gemm_bf16, float, &fc_formats[FC_PACKED_BF16])
#endif
