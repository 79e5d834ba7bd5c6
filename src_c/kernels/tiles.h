/* gemm leaves on tile registers (simd/amx.h), for the formats whose lines are rows of a tile: 16 columns, 4 bytes of k
 * each. 16 lines of a panel, 1 KiB in a row, are one tile of W, a row of it k, k + 1 (bfloat16) or k .. k + 3 (bytes).
 *
 * A block of C is 32 rows by two panels, or, where no more rows are left, up to 16 by four:
 *
 *     tile 0 | 1      4   rows of x      6 | 7 panels of W        tile 0 | 1 | 2 | 3     4   rows of x   5, 6, 7 of W
 *          2 | 3      5
 *
 * An output's chain is over tiles of k in order, from the start of what a call is given, and a product's bits do not
 * depend on what else is in its tiles: one row has the bits of many. Rows, and the k of the last tile, that are not
 * there are not in the tiles' shapes either, so nothing is read beyond them. */

enum { TILE_ROWS = 16, TILE_LINES = 16, TILE_BYTES = TILE_LINES * FC_LINE, TILE_AHEAD = 4096 };

/* Up to 2 x TILE_ROWS rows, upper and lower, of `lines` lines of k. */
FC_INLINE struct tile_shapes shapes_of_pairs(ptrdiff_t lower, ptrdiff_t lines) {
    struct tile_shapes s = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        const int of_w = t >= 6, of_x = t == 4 || t == 5, is_lower = t == 2 || t == 3 || t == 5;
        s.rows[t] = (uint8_t)(of_w ? lines : is_lower ? lower : TILE_ROWS);
        s.row_bytes[t] = (uint16_t)(of_x ? lines * 4 : FC_LINE);
    }
    return s;
}

FC_INLINE struct tile_shapes shapes_of_row(ptrdiff_t rows, ptrdiff_t lines) {
    struct tile_shapes s = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        s.rows[t] = (uint8_t)(t >= 5 ? lines : rows);
        s.row_bytes[t] = (uint16_t)(t == 4 ? lines * 4 : FC_LINE);
    }
    return s;
}

/* What a pass over C multiplies: rows [row, row + rows) by lines [line, line + lines) of each panel, tile_lines at once. */
struct tile_pass {
    ptrdiff_t row, rows, line, lines, tile_lines;
    int accumulate;
};

FC_INLINE const char *x_of(const struct fc_gemm *g, const struct tile_pass *p, ptrdiff_t row) {
    return (const char *)g->x + row * g->ldx + p->line * 4;
}
FC_INLINE const char *w_of(const struct fc_gemm *g, const struct tile_pass *p, ptrdiff_t panel) {
    return (const char *)g->w + panel * g->panel_stride + p->line * FC_LINE;
}

/* Lines from p on, `count` of them, `ld` apart */
FC_INLINE void prefetch_lines(const char *p, ptrdiff_t ld, const int count, const int level) {
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        if (level == 1) __builtin_prefetch(p + i * ld, 0, 3);
        else __builtin_prefetch(p + i * ld, 0, 2);
    }
}

/* C's 32 rows from `row` on, panels panel and panel + 1. Meanwhile the block of C below comes near, and, since each
 * block of rows asks for another share, the next lines of both panels. */
FC_INLINE void tile_pairs(const struct fc_gemm *g, const struct tile_pass *p, ptrdiff_t row, ptrdiff_t panel) {
    const ptrdiff_t ldx = g->ldx, ldc = g->ldc, stride = g->panel_stride;
    const char *x = x_of(g, p, row), *below = x + TILE_ROWS * ldx, *w = w_of(g, p, panel);
    char *c = (char *)g->c + row * ldc + panel * FC_LINE, *c_below = c + TILE_ROWS * ldc;
    const ptrdiff_t share = p->lines * FC_LINE / ((g->m + 31) / 32) / FC_LINE * FC_LINE;
    const char *next_w = w + p->lines * FC_LINE + row / 32 * share, *next_w_end = next_w + share;
    const char *next_c = c + 2 * TILE_ROWS * ldc, *next_c_end = next_c + 2 * TILE_ROWS * ldc;
    if (p->accumulate) {
        tile_load(0, c, ldc);
        tile_load(1, c + FC_LINE, ldc);
        tile_load(2, c_below, ldc);
        tile_load(3, c_below + FC_LINE, ldc);
    } else {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    }
    for (ptrdiff_t line = 0; line < p->lines; line += TILE_LINES) {
        tile_load_once(4, x, ldx);
        tile_load(6, w, FC_LINE);
        tile_dot_bf16(0, 4, 6);
        if (next_w < next_w_end) {
            prefetch_lines(next_w, stride, 2, 2);
            next_w += FC_LINE;
        }
        tile_load(7, w + stride, FC_LINE);
        tile_dot_bf16(1, 4, 7);
        if (next_c < next_c_end) {
            prefetch_lines(next_c, FC_LINE, 2, 1);
            prefetch_lines(next_c + ldc, FC_LINE, 2, 1);
            next_c += 2 * ldc;
        }
        tile_load_once(5, below, ldx);
        tile_dot_bf16(2, 5, 6);
        tile_dot_bf16(3, 5, 7);
        x += FC_LINE, below += FC_LINE, w += TILE_BYTES;
    }
    tile_store(0, c, ldc);
    tile_store(1, c + FC_LINE, ldc);
    tile_store(2, c_below, ldc);
    tile_store(3, c_below + FC_LINE, ldc);
}

/* C's up to 16 rows, `panels` panels. Each stream of W is asked for some way ahead. */
FC_INLINE void tile_row(const int panels, const struct fc_gemm *g, const struct tile_pass *p, ptrdiff_t panel) {
    const ptrdiff_t ldx = g->ldx, ldc = g->ldc, stride = g->panel_stride;
    const char *x = x_of(g, p, p->row), *w = w_of(g, p, panel);
    char *c = (char *)g->c + p->row * ldc + panel * FC_LINE;
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    if (p->accumulate) {
        tile_load(0, c, ldc);
        if (panels > 1) tile_load(1, c + FC_LINE, ldc);
        if (panels > 2) tile_load(2, c + 2 * FC_LINE, ldc);
        if (panels > 3) tile_load(3, c + 3 * FC_LINE, ldc);
    }
    for (ptrdiff_t line = 0; line < p->lines; line += TILE_LINES) {
        tile_load(4, x, ldx);
        tile_load(5, w, FC_LINE);
        tile_dot_bf16(0, 4, 5);
        if (panels > 1) {
            tile_load(6, w + stride, FC_LINE);
            tile_dot_bf16(1, 4, 6);
        }
        if (panels > 2) {
            tile_load(7, w + 2 * stride, FC_LINE);
            tile_dot_bf16(2, 4, 7);
        }
        if (panels > 3) {
            tile_load(5, w + 3 * stride, FC_LINE);
            tile_dot_bf16(3, 4, 5);
        }
#pragma GCC unroll 4
        for (int j = 0; j < panels; j++) prefetch_lines(w + j * stride + TILE_AHEAD, FC_LINE, TILE_LINES, 2);
        x += FC_LINE, w += TILE_BYTES;
    }
    tile_store(0, c, ldc);
    if (panels > 1) tile_store(1, c + FC_LINE, ldc);
    if (panels > 2) tile_store(2, c + 2 * FC_LINE, ldc);
    if (panels > 3) tile_store(3, c + 3 * FC_LINE, ldc);
}

FC_INLINE void tile_columns(const struct fc_gemm *g, const struct tile_pass *p, ptrdiff_t panel, ptrdiff_t end) {
    for (; panel + 4 <= end; panel += 4) tile_row(4, g, p, panel);
    if (panel + 2 <= end) {
        tile_row(2, g, p, panel);
        panel += 2;
    }
    if (panel < end) tile_row(1, g, p, panel);
}

/* Rows [row, row + rows) by panels [panel, end): 16 rows at a time, each over all panels */
static __attribute__((noinline)) void tile_rows(const struct fc_gemm *g, struct tile_pass p, ptrdiff_t panel) {
    const ptrdiff_t end = p.row + p.rows;
    for (; p.row < end; p.row += p.rows) {
        p.rows = end - p.row < TILE_ROWS ? end - p.row : TILE_ROWS;
        const struct tile_shapes shapes = shapes_of_row(p.rows, p.tile_lines);
        tiles_begin(&shapes);
        tile_columns(g, &p, panel, g->panels);
    }
}

/* Whole blocks of 32 rows, and one of more than 16, by pairs of panels; then what is left of either */
static __attribute__((noinline)) void tile_blocks(const struct fc_gemm *g, struct tile_pass p) {
    const ptrdiff_t whole = g->m / 32 * 32, paired = g->panels / 2 * 2, few = g->m - whole;
    struct tile_shapes shapes = shapes_of_pairs(TILE_ROWS, p.tile_lines);
    tiles_begin(&shapes);
    for (ptrdiff_t panel = 0; panel < paired; panel += 2)
        for (ptrdiff_t row = 0; row < whole; row += 32) tile_pairs(g, &p, row, panel);
    if (few > TILE_ROWS) {
        shapes = shapes_of_pairs(few - TILE_ROWS, p.tile_lines);
        tiles_begin(&shapes);
        for (ptrdiff_t panel = 0; panel < paired; panel += 2) tile_pairs(g, &p, whole, panel);
    }
    p.rows = few > TILE_ROWS ? g->m : whole;
    if (paired < g->panels) tile_rows(g, p, paired);
    p.row = p.rows, p.rows = g->m - p.rows;
    tile_rows(g, p, 0);
}

static void tile_passes(const struct fc_gemm *g, struct tile_pass p) {
    if (g->m > TILE_ROWS) tile_blocks(g, p);
    else tile_rows(g, p, 0);
}

/* Whole tiles of k, then the lines that fill none. */
static void gemm_bf16(const struct fc_gemm *g) {
    const ptrdiff_t whole = g->lines / TILE_LINES * TILE_LINES;
    struct tile_pass p = {.rows = g->m, .lines = whole, .tile_lines = TILE_LINES, .accumulate = g->accumulate};
    if (whole || g->lines == 0) tile_passes(g, p);
    p.line = whole, p.lines = p.tile_lines = g->lines - whole, p.accumulate |= whole > 0;
    if (p.lines) tile_passes(g, p);
    tiles_end();
}
