/* Integer formats under gemm.h's tiles: exact sums over chunks of k, then scales and minima, chunk by chunk. */

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

/* v stays in its register: gcc copies sums there, and keeps lines of W on the stack. In software it has no such one. */
#if defined(FC_HAS_I8_DOT) && FC_BYTES == 64 && !defined(FC_SOFTWARE_AVX512)
#define PIN(v) __asm__("" : "+v"(v))
#else
#define PIN(v) (void)(v)
#endif

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
            for (int j = 0; j < nv; j++) {
                wv[j] = int_part(f, part, line_of(f, line, panel_stride, j));
                PIN(wv[j]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
                for (int j = 0; j < nv; j++) {
                    acc[i][j] = int_step(f, acc[i][j], wv[j], x + i * ldx + 4 * part);
                    PIN(acc[i][j]);
                }
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

/* Sums in float32 that find registers beside as many of integers */
#ifdef FC_HAS_I8_DOT
enum { MOST_IN_REGISTERS = FC_BYTES == 64 ? 12 : FC_NV_FEW };
#else
enum { MOST_IN_REGISTERS = FC_NV_FEW };
#endif

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
    gemm_prefetch prefetch = prefetch_next(f, nv, g, vector, g->blocks * block, 1, tile, tiles);
    /* more than so many, and the registers are for acc: 12 of each leave 2 or 4 for W, 1 for x, with dot products */
    const int in_memory = mr * nv > MOST_IN_REGISTERS || (two && (mr > 1 || FC_BYTES < 64));
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
    gemm_prefetch prefetch = prefetch_next(f, nv, g, vector, g->lines * fc_line_bytes(f), 1, tile, tiles);
    vi acc[FC_PASS_ROWS][FC_NV_FEW];
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

FC_GEMM(gemm_s8, pair, &fc_page_i8)

/* Integer formats: one plane of x, or two. */
#define FC_INT_GEMM(name, format)                                                                                      \
    FC_GEMM(name##_int, int, format)                                                                                   \
    FC_GEMM(name##_planes, planes, format)                                                                             \
    static void name(const struct fc_gemm *g) { (g->planes == 2 ? name##_planes : name##_int)(g); }
#define FC_ONE_GEMM(name, format)                                                                                      \
    FC_GEMM(name##_int, int, format)                                                                                   \
    static void name(const struct fc_gemm *g) { name##_int(g); }
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
