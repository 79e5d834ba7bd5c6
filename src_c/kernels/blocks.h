/* C[m][16 panels] (+)= X[m][k] W for formats that expand: a few rows take the blocks apart in registers, since they would
 * read what expands only once. The sums and their order are those of gemm.h, hence the bits. */

enum { BLOCK_ROWS = 4, BLOCK_UNROLLED = FC_BYTES > 16 ? 2 : 1 }; /* of a tile; vectors of a panel: few registers */

/* acc[rows] += the sums of u q over group n of a pair, as block_line says, for the vector of columns `part` bytes into
 * a line; x[rows]: the integers */
FC_INLINE void block_sums(block_shape s, gemm_format f, const int rows, vi acc[], const char *block, size_t pair,
                          const size_t n, size_t part, const char *const x[]) {
    const size_t lines = (size_t)s->f->group / 4;
    const int parts = parts_of(f), shorts = short_sums(f);
    const vi ones = (vi){0} + 0x00010001;
    vi sum[2 * BLOCK_ROWS];
#pragma GCC unroll 8
    for (size_t i = 0; i < lines; i++) {
        const vu u = block_line(s, block, pair, n * lines + i, part);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const char *values = x[r] + 4 * i * (size_t)parts;
            if (shorts && i % (lines / (size_t)shorts) == 0) {
                sum[r] = int_first((vi)u, values);
                continue;
            }
            vi *to = shorts ? sum : acc;
#pragma GCC unroll 2
            for (int p = 0; p < parts; p++) to[r] = int_step(f, to[r], int_part_of(f, p, u), values + 4 * p);
            if (shorts && (i + 1) % (lines / (size_t)shorts) == 0) acc[r] = vi_add_madd16(acc[r], sum[r], ones);
        }
    }
}

/* The sums of mr rows of a chunk of x, in one plane or two */
FC_INLINE void block_chunk(block_shape s, gemm_format f, const int two, const int mr, vi acc[], const char *block,
                           size_t pair, const size_t n, size_t part, const char *x, ptrdiff_t ldx, const char *end) {
    const char *row[2 * BLOCK_ROWS];
    vi sum[2 * BLOCK_ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) {
        const int high = two ? 2 * i : i, low = high + two;
        sum[high] = (vi){0};
        sum[low] = sum[high] + chunk_of_row(end, ldx, i)->start;
        row[high] = x + i * ldx;
        row[low] = row[high] + two * s->f->group;
    }
    block_sums(s, f, mr * (1 + two), sum, block, pair, n, part, row);
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++) acc[i] = two ? (sum[2 * i] << 7) + sum[2 * i + 1] : sum[i];
}

/* y += that group for mr rows; end: of the chunk's integers. x is broadcast anew for each vector: so many values would
 * end on the stack. */
FC_INLINE void block_group(block_shape s, gemm_format f, const int two, const int mr, vf y[][FC_PER_PANEL],
                           const char *block, size_t pair, const size_t n, const char *x, ptrdiff_t ldx,
                           const char *end) {
    const size_t g = pair * groups_at_once(s) + n;
#pragma GCC unroll BLOCK_UNROLLED
    for (size_t v = 0; v < FC_PER_PANEL; v++) {
        const vf scale = block_scale(s, block, g, v * FC_N);
        const vf minimum = s->f->minimum_bytes ? block_minimum(s, block, g, v * FC_N) : vf_zero();
        vi acc[BLOCK_ROWS];
        block_chunk(s, f, two, mr, acc, block, pair, n, v * FC_BYTES, opaque(x), ldx, end);
#pragma GCC unroll 4
        for (int i = 0; i < mr; i++) {
            const struct fc_chunk *chunk = chunk_of_row(end, ldx, i);
            if (s->f->minimum_bytes) y[i][v] = vf_fma(vf_load1(&chunk->sum), minimum, y[i][v]);
            y[i][v] = vf_fma(vf_from_int(acc[i]), vf_load1(&chunk->scale) * scale, y[i][v]);
        }
    }
}

/* c[mr][FC_PANEL] (+)= x[mr] w of a panel w. What the panel has further on is asked for pair by pair. */
FC_INLINE void block_panel(block_shape s, gemm_format f, const int two, const int mr, const struct fc_gemm *g,
                           ptrdiff_t row, ptrdiff_t panel) {
    const size_t at_once = groups_at_once(s), pairs = (size_t)s->f->block_groups / at_once;
    const size_t ahead = ((size_t)s->f->block_lines + pairs - 1) / pairs;
    const ptrdiff_t integers = s->f->group * int_x_bytes(f) * (1 + two), ldx = g->ldx;
    const char *x = (const char *)g->x + row * ldx, *w = (const char *)g->w + panel * g->panel_stride;
    char *c = (char *)(g->c + panel * FC_PANEL) + row * g->ldc;
    vf y[BLOCK_ROWS][FC_PER_PANEL];
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int v = 0; v < FC_PER_PANEL; v++)
            y[i][v] = g->accumulate ? vf_load(c + i * g->ldc + v * FC_BYTES) : vf_zero();
    for (ptrdiff_t blocks = g->blocks; blocks > 0; blocks--, w += s->f->block_lines * FC_LINE)
        for (size_t pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 32
            for (size_t line = 0; line < ahead; line++)
                __builtin_prefetch(w + next_bytes(f) + (pair * ahead + line) * FC_LINE, 0, 2);
#pragma GCC unroll 2
            for (size_t n = 0; n < at_once; n++, x += fc_chunk_bytes(integers, FC_X_ALIGN))
                block_group(s, f, two, mr, y, w, pair, n, x, ldx, x + integers);
        }
#pragma GCC unroll 4
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int v = 0; v < FC_PER_PANEL; v++) vf_store(c + i * g->ldc + v * FC_BYTES, y[i][v]);
}

/* One function each for its own registers: integers of x as gemm_u8 takes them in one plane, in two, and as gemm_u4 and
 * gemm_u6 do. All rows take a panel before the next one. */
typedef void block_tile(const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t panel);
FC_INLINE void block_rows(block_tile *one, block_tile *two, block_tile *four, const struct fc_gemm *g) {
    for (ptrdiff_t panel = 0; panel < g->panels; panel++) {
        ptrdiff_t row = 0;
        for (; four && row + 4 <= g->m; row += 4) four(g, row, panel);
        for (; two && row + 2 <= g->m; row += 2) two(g, row, panel);
        for (; row < g->m; row++) one(g, row, panel);
    }
}
#define FC_BLOCK_TILE(name, s, format, two, mr)                                                                        \
    static __attribute__((noinline)) void name(const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t panel) {              \
        block_panel(s, format, two, mr, g, row, panel);                                                                \
    }
#if FC_BYTES == 16 /* rows that share what was taken apart would have no registers */
#define FC_BLOCK_GEMM(name, s, format, two)                                                                            \
    FC_BLOCK_TILE(name##_1, s, format, two, 1)                                                                         \
    static void name(const struct fc_gemm *g) { block_rows(name##_1, NULL, NULL, g); }
#else
#define FC_BLOCK_GEMM(name, s, format, two)                                                                            \
    FC_BLOCK_TILE(name##_1, s, format, two, 1)                                                                         \
    FC_BLOCK_TILE(name##_2, s, format, two, 2)                                                                         \
    FC_BLOCK_TILE(name##_4, s, format, two, 4)                                                                         \
    static void name(const struct fc_gemm *g) { block_rows(name##_1, name##_2, name##_4, g); }
#endif
#ifdef FC_HAS_I8_DOT
#define FC_FEW_ROWS(name, layout)                                                                                      \
    FC_BLOCK_GEMM(few_##name##_int, &shape_##name, &fc_formats[FC_PACKED_I8], 0)                                       \
    FC_BLOCK_GEMM(few_##name##_planes, &shape_##name, &fc_formats[FC_PACKED_I8], 1)                                    \
    static void few_##name(const struct fc_gemm *g) { (g->planes == 2 ? few_##name##_planes : few_##name##_int)(g); }
#elif defined(FC_HAS_MADDUBS)
FC_INLINE gemm_format short_lines(const struct fc_format *f) {
    return f->expands == FC_TO_U4   ? &gemm_lines_u4
           : f->expands == FC_TO_U6 ? &gemm_lines_u6
                                    : &fc_formats[FC_PACKED_I8];
}
#define FC_FEW_ROWS(name, layout)                                                                                      \
    FC_BLOCK_GEMM(few_##name##_int, &shape_##name, short_lines(&fc_formats[layout]), 0)                                \
    FC_BLOCK_GEMM(few_##name##_wide, &shape_##name, &fc_formats[FC_PACKED_I8], 0)                                      \
    static void few_##name(const struct fc_gemm *g) { (g->wide ? few_##name##_wide : few_##name##_int)(g); }
#else
#define FC_FEW_ROWS(name, layout) FC_BLOCK_GEMM(few_##name, &shape_##name, &fc_formats[FC_PACKED_I8], 0)
#endif
FC_EXPANSIONS(FC_FEW_ROWS)
