/* gemm leaves on tile registers (simd/amx.h), for the formats whose lines are rows of a tile: 16 columns, 4 bytes of k
 * each. 16 lines of a panel, 1 KiB in a row, are one tile of W, a row of it k, k + 1 (bfloat16) or k .. k + 3 (bytes).
 *
 * A block of C is 32 rows by two panels, or, where no more rows are left, up to 16 by four:
 *
 *     tile 0 | 1      4   rows of x      6 | 7 panels of W        tile 0 | 1 | 2 | 3     4   rows of x   5, 6, 7 of W
 *          2 | 3      5
 *
 * An output's chain is over tiles of k in order, from the start of what a call is given, and a product's bits do not
 * depend on what else is in its tiles: one row has the bits of many. Rows that are not there are not in the tiles'
 * shapes either, so nothing is read beyond them; k that fill no tile are copied, zeros behind them. */

enum { TILE_ROWS = 16, TILE_LINES = 16, TILE_BYTES = TILE_LINES * FC_LINE, TILE_AHEAD = 4096, TILE_CALL_ROWS = 512 };

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

/* k that fill no tile, with zeros up to a whole one: rows of x, panels of W. */
struct tile_rest {
    char x[TILE_CALL_ROWS][FC_LINE], w[4][TILE_BYTES];
};

/* Whole tiles of k, and lines that are left */
struct tile_pass {
    ptrdiff_t row, rows, tiles, lines_left;
    struct tile_rest *rest;
};

FC_INLINE void tile_rest_of_x(const struct tile_pass *p, const char *x, ptrdiff_t ldx) {
    if (p->lines_left == 0) return;
    x += p->tiles * FC_LINE;
    for (ptrdiff_t i = 0; i < p->rows; i++, x += ldx)
        vf_store(p->rest->x[i], vf_load_n((const float *)(const void *)x, p->lines_left));
}

/* Of `panels` panels */
FC_INLINE void tile_rest_of_w(const struct tile_pass *p, const char *w, ptrdiff_t stride, int panels) {
    if (p->lines_left == 0) return;
    for (int j = 0; j < panels; j++) {
        const char *from = w + j * stride + p->tiles * TILE_BYTES;
        for (ptrdiff_t i = 0; i < TILE_BYTES; i += FC_BYTES)
            vf_store(p->rest->w[j] + i, i < p->lines_left * FC_LINE ? vf_load(from + i) : (vf){0});
    }
}

/* Lines from p on, `count` of them, `ld` apart */
FC_INLINE void prefetch_lines(const char *p, ptrdiff_t ld, const int count, const int level) {
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        if (level == 1) __builtin_prefetch(p + i * ld, 0, 3);
        else __builtin_prefetch(p + i * ld, 0, 2);
    }
}

/* Tile t's sums to where they belong, and those of the next block into it */
#define FC_TILE_TURN(t, before, next, offset, ld, accumulate)                                                          \
    if (before) tile_store(t, (before) + (offset), ld);                                                                \
    if (accumulate) tile_load(t, (next) + (offset), ld);                                                               \
    else tile_zero(t);

#define FC_TILE_LOAD(once, t, p, ld)                                                                                   \
    if (once) tile_load_once(t, p, ld);                                                                                \
    else tile_load(t, p, ld);

/* One step of 32 rows by two panels: tiles 0 .. 3 += x w. Of x (x_once) or of w nothing is needed again soon. */
FC_INLINE void tile_pair_step(const int x_once, const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t stride) {
    FC_TILE_LOAD(x_once, 4, x, ldx)
    FC_TILE_LOAD(!x_once, 6, w, FC_LINE)
    tile_dot_bf16(0, 4, 6);
    FC_TILE_LOAD(!x_once, 7, w + stride, FC_LINE)
    tile_dot_bf16(1, 4, 7);
    FC_TILE_LOAD(x_once, 5, x + TILE_ROWS * ldx, ldx)
    tile_dot_bf16(2, 5, 6);
    tile_dot_bf16(3, 5, 7);
}

/* The same, of the first k of a block of C: each tile is needed a product later than the one before it. */
FC_INLINE void tile_first_step(const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t stride, char *before, char *c,
                               ptrdiff_t ldc, int accumulate) {
    tile_load_once(4, x, ldx);
    tile_load(6, w, FC_LINE);
    FC_TILE_TURN(0, before, c, 0, ldc, accumulate)
    tile_dot_bf16(0, 4, 6);
    tile_load(7, w + stride, FC_LINE);
    FC_TILE_TURN(1, before, c, FC_LINE, ldc, accumulate)
    tile_dot_bf16(1, 4, 7);
    tile_load_once(5, x + TILE_ROWS * ldx, ldx);
    FC_TILE_TURN(2, before, c, TILE_ROWS * ldc, ldc, accumulate)
    tile_dot_bf16(2, 5, 6);
    FC_TILE_TURN(3, before, c, TILE_ROWS * ldc + FC_LINE, ldc, accumulate)
    tile_dot_bf16(3, 5, 7);
}

FC_INLINE void tile_clear_pairs(void) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
}

FC_INLINE void tile_store_pairs(char *c, ptrdiff_t ldc) {
    tile_store(0, c, ldc);
    tile_store(1, c + FC_LINE, ldc);
    tile_store(2, c + TILE_ROWS * ldc, ldc);
    tile_store(3, c + TILE_ROWS * ldc + FC_LINE, ldc);
}

/* A block of C, 32 rows by two panels, and what comes near meanwhile: the next block, to L1, and, since each block of
 * rows asks for another share, the next pair of panels, to L2 */
struct tile_block {
    char *c, *next_c;
    const char *x, *x_rest, *w, *next_w;
    ptrdiff_t share;
};

/* The sums of this block are left in the tiles, those in them go to `before` while its first products are made: a sum
 * is ready long after the last product is asked for. */
FC_INLINE void tile_pairs(const struct fc_gemm *g, const struct tile_pass *p, const struct tile_block *b,
                          char *before) {
    const ptrdiff_t ldx = g->ldx, ldc = g->ldc, stride = g->panel_stride;
    const char *x = b->x, *w = b->w, *next_w = b->next_w, *next_w_end = next_w + b->share;
    const char *next_c = b->next_c, *next_c_end = next_c + 2 * TILE_ROWS * ldc;
    if (p->tiles == 0) {
        tile_first_step(b->x_rest, FC_LINE, p->rest->w[0], TILE_BYTES, before, b->c, ldc, g->accumulate);
        return;
    }
    tile_first_step(x, ldx, w, stride, before, b->c, ldc, g->accumulate);
    for (ptrdiff_t tile = 1; tile < p->tiles; tile++) {
        x += FC_LINE, w += TILE_BYTES;
        tile_pair_step(1, x, ldx, w, stride);
        if (next_w < next_w_end) {
            prefetch_lines(next_w, stride, 2, 2);
            next_w += FC_LINE;
        }
        if (next_c < next_c_end) {
            prefetch_lines(next_c, FC_LINE, 2, 1);
            prefetch_lines(next_c + ldc, FC_LINE, 2, 1);
            next_c += 2 * ldc;
        }
    }
    if (p->lines_left) tile_pair_step(1, b->x_rest, FC_LINE, p->rest->w[0], TILE_BYTES);
}

FC_INLINE void tile_row_step(const int panels, const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t stride) {
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
}

/* C's up to 16 rows, `panels` panels. Each stream of W is asked for some way ahead. */
FC_INLINE void tile_row(const int panels, const struct fc_gemm *g, const struct tile_pass *p, ptrdiff_t panel) {
    const ptrdiff_t ldx = g->ldx, ldc = g->ldc, stride = g->panel_stride;
    const char *x = (const char *)g->x + p->row * ldx, *w = (const char *)g->w + panel * stride;
    char *c = (char *)g->c + p->row * ldc + panel * FC_LINE;
    tile_rest_of_w(p, w, stride, panels);
    tile_clear_pairs();
    if (g->accumulate) {
        tile_load(0, c, ldc);
        if (panels > 1) tile_load(1, c + FC_LINE, ldc);
        if (panels > 2) tile_load(2, c + 2 * FC_LINE, ldc);
        if (panels > 3) tile_load(3, c + 3 * FC_LINE, ldc);
    }
    for (ptrdiff_t tile = 0; tile < p->tiles; tile++, x += FC_LINE, w += TILE_BYTES) {
        tile_row_step(panels, x, ldx, w, stride);
#pragma GCC unroll 4
        for (int j = 0; j < panels; j++) prefetch_lines(w + j * stride + TILE_AHEAD, FC_LINE, TILE_LINES, 2);
    }
    if (p->lines_left) tile_row_step(panels, p->rest->x[p->row], FC_LINE, p->rest->w[0], TILE_BYTES);
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
        const struct tile_shapes shapes = shapes_of_row(p.rows, TILE_LINES);
        tiles_begin(&shapes);
        tile_columns(g, &p, panel, g->panels);
    }
}

/* Rows [row, row + rows), whole blocks of 32 or one of more than 16, by pairs of panels */
FC_INLINE void tile_paired(const struct fc_gemm *g, const struct tile_pass *p, ptrdiff_t paired) {
    const ptrdiff_t stride = g->panel_stride, end = p->row + p->rows, bytes = p->tiles * TILE_BYTES;
    const ptrdiff_t blocks = (p->rows + 31) / 32;
    const struct tile_shapes shapes = shapes_of_pairs(p->rows < 32 ? p->rows - TILE_ROWS : TILE_ROWS, TILE_LINES);
    struct tile_block b = {.share = (bytes / blocks + FC_LINE - 1) / FC_LINE * FC_LINE};
    char *before = NULL;
    tiles_begin(&shapes);
    for (ptrdiff_t panel = 0; panel < paired; panel += 2) {
        b.w = (const char *)g->w + panel * stride;
        b.next_w = panel + 2 < paired ? b.w + 2 * stride : g->next_w ? g->next_w : (const char *)g->w + bytes;
        tile_rest_of_w(p, b.w, stride, 2);
        for (ptrdiff_t row = p->row; row < end; row += 32, b.next_w += b.share) {
            b.c = (char *)g->c + row * g->ldc + panel * FC_LINE;
            b.next_c = row + 32 < end ? b.c + 32 * g->ldc : (char *)g->c + p->row * g->ldc + (panel + 2) * FC_LINE;
            b.x = (const char *)g->x + row * g->ldx;
            b.x_rest = p->rest->x[row];
            tile_pairs(g, p, &b, before);
            before = b.c;
        }
    }
    if (before) tile_store_pairs(before, g->ldc);
}

/* Whole blocks of 32 rows, and one of more than 16, by pairs of panels; then what is left of either */
static __attribute__((noinline)) void tile_blocks(const struct fc_gemm *g, struct tile_pass p) {
    const ptrdiff_t whole = g->m / 32 * 32, paired = g->panels / 2 * 2, few = g->m - whole;
    p.rows = whole;
    if (whole) tile_paired(g, &p, paired);
    p.row = whole, p.rows = few;
    if (few > TILE_ROWS) tile_paired(g, &p, paired);
    p.row = 0, p.rows = few > TILE_ROWS ? g->m : whole;
    if (paired < g->panels) tile_rows(g, p, paired);
    p.row = p.rows, p.rows = g->m - p.rows;
    tile_rows(g, p, 0);
}

/* Up to TILE_CALL_ROWS rows */
static __attribute__((noinline)) void tile_call(const struct fc_gemm *g) {
    struct tile_rest rest __attribute__((aligned(FC_LINE)));
    struct tile_pass p = {.rows = g->m, .tiles = g->lines / TILE_LINES, .lines_left = g->lines % TILE_LINES,
                          .rest = &rest};
    tile_rest_of_x(&p, g->x, g->ldx);
    if (g->m > TILE_ROWS && g->lines) tile_blocks(g, p);
    else tile_rows(g, p, 0);
}

static void gemm_bf16(const struct fc_gemm *g) {
    struct fc_gemm part = *g;
    for (ptrdiff_t row = 0; row < g->m; row += TILE_CALL_ROWS) {
        part.m = g->m - row < TILE_CALL_ROWS ? g->m - row : TILE_CALL_ROWS;
        tile_call(&part);
        part.c = (float *)(void *)((char *)part.c + part.m * g->ldc);
        part.x = (const char *)part.x + part.m * g->ldx;
    }
    tiles_end();
}

#include "tiles_integers.h"
