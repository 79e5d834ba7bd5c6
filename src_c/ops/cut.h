/* How a product of M rows with panels of W is cut into items for threads: a pure function of sizes. Each thread takes a
 * run of neighbours (fc_static), so the time of all is that of the longest run. */
#ifndef FC_OPS_CUT_H
#define FC_OPS_CUT_H

#include "../kernels.h"

struct fc_cut {
    ptrdiff_t tile_panels, tiles; /* a tile: so many panels of W, */
    ptrdiff_t block_rows, blocks; /* under so many rows of x at a time */
    ptrdiff_t item_blocks;        /* an item: so many blocks of a tile */
};

/* Rows times panels of the items before item i; of a tile's blocks the last may be lower, the last tile narrower. */
static inline ptrdiff_t fc_cut_before(const struct fc_cut *c, ptrdiff_t m, ptrdiff_t panels, ptrdiff_t i) {
    const ptrdiff_t tile = i * c->item_blocks / c->blocks, row = i * c->item_blocks % c->blocks * c->block_rows;
    const ptrdiff_t panel = tile * c->tile_panels, rest = panels - panel;
    return rest <= 0 ? m * panels : panel * m + (rest < c->tile_panels ? rest : c->tile_panels) * row;
}

/* Of the threads' time, the part in which all of them work. */
static inline double fc_cut_fullness(const struct fc_cut *c, ptrdiff_t m, ptrdiff_t panels, int threads) {
    const ptrdiff_t items = c->tiles * c->blocks / c->item_blocks;
    ptrdiff_t longest = 1, before = 0;
    for (int t = 1; t <= threads; t++) {
        const ptrdiff_t end = fc_cut_before(c, m, panels, items * t / threads);
        if (end - before > longest) longest = end - before;
        before = end;
    }
    return (double)(m * panels) / (double)longest / (double)threads;
}

/* The largest tiles, then the highest blocks of at most `rows` rows, that keep the threads busy for FULL of the time;
 * else those that keep them busiest. in_order: an item is all blocks of a tile, since a row of the result may be named
 * twice. */
static inline struct fc_cut fc_cut_product(const struct fc_blocks *sizes, ptrdiff_t m, ptrdiff_t panels, ptrdiff_t rows,
                                           int in_order, int threads) {
    static const double FULL = 0.94; /* smaller tiles read x more often than the rest is worth */
    const ptrdiff_t largest = m > sizes->many_rows ? sizes->many_panels : sizes->few_panels;
    struct fc_cut best = {0};
    double best_fullness = 0;
    for (ptrdiff_t blocks = (m + rows - 1) / rows;; blocks++) {
        const ptrdiff_t share = (m + blocks - 1) / blocks, tile = sizes->tile_rows;
        const ptrdiff_t block_rows = blocks == 1 ? m : (share + tile - 1) / tile * tile;
        if (best_fullness > 0 && (block_rows < sizes->many_rows || in_order)) return best;
        for (ptrdiff_t panels_each = largest; panels_each > 0; panels_each -= sizes->few_panels) {
            struct fc_cut c = {.tile_panels = panels_each, .tiles = (panels + panels_each - 1) / panels_each,
                               .block_rows = block_rows, .blocks = (m + block_rows - 1) / block_rows};
            c.item_blocks = in_order ? c.blocks : 1;
            const double fullness = fc_cut_fullness(&c, m, panels, threads);
            if (fullness > best_fullness) best = c, best_fullness = fullness;
            if (fullness >= FULL) return c;
        }
    }
}

#endif
