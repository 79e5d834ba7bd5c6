/* C[m][16 panels] (+)= X[m][k] W as the gemm leaves, with their bits, for few rows and for keys and values that come
 * from memory: panel after panel, in the order in which they lie, each under all rows while it is near. (Short vectors:
 * the gemm leaves do that, and a tile's products fill the time.)
 *
 * Meanwhile the lines some way ahead are prefetched: so far that memory goes on working while scores become weights. A
 * tile (AMX) loads so many lines at once that the next ones are best: those of the same 4 KiB, in which the processor
 * itself fetches on. */

#if FC_BYTES < 64
static void paged_f32(const struct fc_gemm *g) { gemm_f32(g); }
static void paged_bf16(const struct fc_gemm *g) { gemm_bf16(g); }
static void paged_s8(const struct fc_gemm *g) { gemm_s8(g); }
#else
/* So many sums hide the latency of both units. */
enum { PAGED_ROWS = 8, PAGED_AHEAD = 8192, PAGED_TILES_AHEAD = 1024 };

/* What a tile multiplies: x (rows, k) by the panel or panels at w, into c. For each line it prefetches next, and then
 * goes on by step. */
struct paged_part {
    const char *x, *w, *next;
    char *c;
    ptrdiff_t step;
};

FC_INLINE void paged_float(gemm_format f, const int mr, const int width, const struct fc_gemm *g,
                           struct paged_part p) {
    const int parts = parts_of(f);
    const ptrdiff_t ldx = g->ldx, ldc = g->ldc;
    vf acc[PAGED_ROWS];
    (void)width; /* 1 */
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) acc[i] = g->accumulate ? vf_load(p.c + i * ldc) : vf_zero();
    for (ptrdiff_t lines = g->lines; lines > 0; lines--, p.x += 4 * parts, p.w += FC_LINE, p.next += p.step) {
        __builtin_prefetch(p.next, 0, 2);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            const vf w = float_part(f, part, p.w);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) acc[i] = float_step(f, acc[i], w, p.x + i * ldx + 4 * part);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) vf_store(p.c + i * ldc, acc[i]);
}

FC_INLINE void paged_pair(gemm_format f, const int mr, const int width, const struct fc_gemm *g, struct paged_part p) {
    const ptrdiff_t ldx = g->ldx, ldc = g->ldc, stride = g->panel_stride;
    vi acc[PAGED_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) acc[i][0] = acc[i][1] = (vi){0};
    for (ptrdiff_t lines = g->lines; lines > 0; lines--, p.x += 4, p.w += fc_line_bytes(f), p.next += p.step) {
        __builtin_prefetch(p.next, 0, 2);
        vi w[2];
#pragma GCC unroll 2
        for (int j = 0; j < width; j++) w[j] = int_part(f, 0, p.w + j * stride);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
            for (int j = 0; j < width; j++) acc[i][j] = int_step(f, acc[i][j], w[j], p.x + i * ldx);
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < width; j++) vf_store(p.c + i * ldc + j * FC_LINE, vf_from_int(acc[i][j]));
}

typedef void paged_tile(const struct fc_gemm *g, struct paged_part p);
#define FC_PAGED_TILE(name, kind, format, mr, width)                                                                   \
    static __attribute__((noinline)) void name(const struct fc_gemm *g, struct paged_part p) {                         \
        paged_##kind(format, mr, width, g, p);                                                                         \
    }
#define FC_PAGED_TILES(name, kind, format, width)                                                                      \
    FC_PAGED_TILE(name##_1, kind, format, 1, width)                                                                    \
    FC_PAGED_TILE(name##_2, kind, format, 2, width)                                                                    \
    FC_PAGED_TILE(name##_3, kind, format, 3, width)                                                                    \
    FC_PAGED_TILE(name##_4, kind, format, 4, width)                                                                    \
    FC_PAGED_TILE(name##_5, kind, format, 5, width)                                                                    \
    FC_PAGED_TILE(name##_6, kind, format, 6, width)                                                                    \
    FC_PAGED_TILE(name##_7, kind, format, 7, width)                                                                    \
    FC_PAGED_TILE(name##_8, kind, format, 8, width)                                                                    \
    static paged_tile *const name[] = {NULL,     name##_1, name##_2, name##_3, name##_4,                               \
                                       name##_5, name##_6, name##_7, name##_8};

/* Panels from `panel` on, `width` at a time, as far as these go; returns the first that is left. The tiles of a panel
 * prefetch a share each of what is as long. */
FC_INLINE ptrdiff_t paged_panels(gemm_format f, paged_tile *const by_rows[], const ptrdiff_t width,
                                 const struct fc_gemm *g, ptrdiff_t panel) {
    const ptrdiff_t tiles = (g->m + PAGED_ROWS - 1) / PAGED_ROWS, bytes = fc_line_bytes(f) * width;
    for (; panel + width <= g->panels; panel += width) {
        struct paged_part p = {.w = (const char *)g->w + panel * g->panel_stride, .step = bytes / tiles};
        for (ptrdiff_t t = 0, row = 0, rows; t < tiles; t++, row += rows) {
            rows = (g->m - row + tiles - t - 1) / (tiles - t);
            p.x = (const char *)g->x + row * g->ldx;
            p.c = (char *)g->c + row * g->ldc + panel * FC_LINE;
            p.next = p.w + PAGED_AHEAD + g->lines * bytes / tiles * t;
            by_rows[rows](g, p);
        }
    }
    return panel;
}

FC_PAGED_TILES(paged_f32_tile, float, &fc_formats[FC_PACKED_F32], 1)
static void paged_f32(const struct fc_gemm *g) {
    paged_panels(&fc_formats[FC_PACKED_F32], paged_f32_tile, 1, g, 0);
}

/* A line of 32 bytes is too little work for what is read of x: two panels at once */
FC_PAGED_TILES(paged_s8_tile, pair, &fc_page_i8, 2)
FC_PAGED_TILES(paged_s8_single, pair, &fc_page_i8, 1)
static void paged_s8(const struct fc_gemm *g) {
    const ptrdiff_t left = paged_panels(&fc_page_i8, paged_s8_tile, 2, g, 0);
    paged_panels(&fc_page_i8, paged_s8_single, 1, g, left);
}

#ifdef FC_HAS_TILES
/* Up to 16 rows of one panel, a whole number of tiles of k */
FC_INLINE void paged_tiles(const struct fc_gemm *g, ptrdiff_t panel) {
    const char *x = g->x, *w = (const char *)g->w + panel * g->panel_stride, *end = w + g->lines * FC_LINE;
    char *c = (char *)g->c + panel * FC_LINE;
    if (g->accumulate) tile_load(0, c, g->ldc);
    else tile_zero(0);
    for (; w < end; x += FC_LINE, w += TILE_BYTES) {
        tile_load(4, x, g->ldx);
        tile_load(5, w, FC_LINE);
        tile_dot_bf16(0, 4, 5);
        prefetch_lines(w + PAGED_TILES_AHEAD, FC_LINE, TILE_LINES, 2);
    }
    tile_store(0, c, g->ldc);
}

static void paged_bf16(const struct fc_gemm *g) {
    if (g->m > TILE_ROWS || g->lines % TILE_LINES) {
        gemm_bf16(g);
        return;
    }
    const struct tile_shapes shapes = shapes_of_row(g->m, TILE_LINES);
    tiles_begin(&shapes);
    for (ptrdiff_t panel = 0; panel < g->panels; panel++) paged_tiles(g, panel);
    tiles_end();
}
#else
FC_PAGED_TILES(paged_bf16_tile, float, &fc_formats[FC_PACKED_BF16], 1)
static void paged_bf16(const struct fc_gemm *g) {
    paged_panels(&fc_formats[FC_PACKED_BF16], paged_bf16_tile, 1, g, 0);
}
#endif
#endif
