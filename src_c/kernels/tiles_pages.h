/* int16 rows by a page of bytes on tiles, for many rows: a row is two of bytes, x = 256 high + low, high signed and low
 * not, whose sums are exact, as those of gemm_s8 are. A panel's lines, pairs of k of 16 columns, become fours of k. */

enum {
    PAGE_TILES = 8,                       /* of k at most: 512 */
    PAGE_TILE_LINES = 2 * TILE_LINES,     /* lines of 32 bytes */
    PAGE_TILE_ROWS = 2 * TILE_ROWS,       /* rows at once */
    PAGE_LEAST_ROWS = 12,                 /* fewer are left to gemm */
    PAGE_LD = PAGE_TILES * FC_LINE + FC_LINE,
    PAGE_BYTES = FC_PANEL * 2,            /* of a line */
};

typedef int16_t page_v16 __attribute__((vector_size(FC_BYTES)));
typedef int8_t page_v8 __attribute__((vector_size(FC_BYTES / 2)));

/* Rows of a block as bytes, zeros up to whole tiles of k; a panel in tiles; its sums, high and low of each 16 rows */
struct page_room {
    char high[PAGE_TILE_ROWS][PAGE_LD], low[PAGE_TILE_ROWS][PAGE_LD];
    char w[PAGE_TILES][TILE_BYTES], sums[4][TILE_BYTES];
};

/* x (rows, 2 lines) -> high, low */
FC_INLINE void page_split(struct page_room *room, const char *x, ptrdiff_t ldx, ptrdiff_t rows, ptrdiff_t lines) {
    for (ptrdiff_t i = 0; i < rows; i++, x += ldx)
        for (ptrdiff_t line = 0; line < lines; line += FC_N) {
            const vf given = line + FC_N <= lines ? vf_load(x + line * 4)
                                                  : vf_load_n((const float *)(const void *)(x + line * 4), lines - line);
            const page_v8 high = __builtin_convertvector((page_v16)given >> 8, page_v8);
            const page_v8 low = __builtin_convertvector((page_v16)given, page_v8);
            memcpy(room->high[i] + line * 2, &high, sizeof high);
            memcpy(room->low[i] + line * 2, &low, sizeof low);
        }
}

/* Two lines (16, 2) next to each other -> one (16, 4) */
FC_INLINE vf page_fours(vf lines) {
    const page_v16 v = (page_v16)lines;
#ifdef __clang__
    return (vf)__builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return (vf)__builtin_shuffle(v, (page_v16){0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                               8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

/* `lines` lines of a panel -> tiles, zeros up to whole ones; what is read a while later is asked for */
FC_INLINE void page_panel(struct page_room *room, const char *w, ptrdiff_t lines) {
    char *to = room->w[0], *end = to + (lines + PAGE_TILE_LINES - 1) / PAGE_TILE_LINES * TILE_BYTES;
    for (; lines >= 2; lines -= 2, w += FC_LINE, to += FC_LINE) {
        __builtin_prefetch(w + PAGED_AHEAD, 0, 2);
        vf_store(to, page_fours(vf_load(w)));
    }
    for (; to < end; lines = 0, to += FC_LINE)
        vf_store(to, page_fours(lines ? vf_load_n((const float *)(const void *)w, PAGE_BYTES / 4) : vf_zero()));
}

/* c (rows) = 256 high + low of a panel */
FC_INLINE void page_put(const struct page_room *room, char *c, ptrdiff_t ldc, ptrdiff_t rows) {
    for (ptrdiff_t i = 0; i < rows; i++, c += ldc) {
        const char *sums = room->sums[i / TILE_ROWS * 2] + i % TILE_ROWS * FC_LINE;
        vf_store(c, vf_from_int(((vi)vf_load(sums) << 8) + (vi)vf_load(sums + TILE_BYTES)));
    }
}

/* sums = rows by the panel in the room; rows above 16 in tiles 2 and 3 */
FC_INLINE void page_sums(struct page_room *room, ptrdiff_t rows, ptrdiff_t lines) {
    const char *w = room->w[0];
    tile_clear_pairs();
    for (ptrdiff_t at = 0; at < lines * 2; at += FC_LINE, w += TILE_BYTES) {
        tile_load(6, w, FC_LINE);
        tile_load(4, room->high[0] + at, PAGE_LD);
        tile_dot_s8s8(0, 4, 6);
        tile_load(5, room->low[0] + at, PAGE_LD);
        tile_dot_u8s8(1, 5, 6);
        if (rows <= TILE_ROWS) continue;
        tile_load(4, room->high[TILE_ROWS] + at, PAGE_LD);
        tile_dot_s8s8(2, 4, 6);
        tile_load(5, room->low[TILE_ROWS] + at, PAGE_LD);
        tile_dot_u8s8(3, 5, 6);
    }
    tile_store(0, room->sums[0], FC_LINE);
    tile_store(1, room->sums[1], FC_LINE);
    if (rows <= TILE_ROWS) return;
    tile_store(2, room->sums[2], FC_LINE);
    tile_store(3, room->sums[3], FC_LINE);
}

/* Rows that are not there are multiplied, too: whatever the room holds. */
static __attribute__((noinline)) void page_rows(const struct fc_gemm *g, const char *x, char *c, ptrdiff_t rows) {
    struct page_room room __attribute__((aligned(FC_LINE)));
    page_split(&room, x, g->ldx, rows, g->lines);
    for (ptrdiff_t panel = 0; panel < g->panels; panel++) {
        page_panel(&room, (const char *)g->w + panel * g->panel_stride, g->lines);
        page_sums(&room, rows, g->lines);
        page_put(&room, c + panel * FC_LINE, g->ldc, rows);
    }
}

FC_INLINE void page_s8(const struct fc_gemm *g, void (*few)(const struct fc_gemm *)) {
    if (g->m < PAGE_LEAST_ROWS || g->lines > PAGE_TILES * PAGE_TILE_LINES || g->accumulate) {
        few(g);
        return;
    }
    const struct tile_shapes shapes = shapes_of_pairs(TILE_ROWS, TILE_LINES);
    tiles_begin(&shapes);
    for (ptrdiff_t row = 0; row < g->m; row += PAGE_TILE_ROWS)
        page_rows(g, (const char *)g->x + row * g->ldx, (char *)g->c + row * g->ldc,
                  g->m - row < PAGE_TILE_ROWS ? g->m - row : PAGE_TILE_ROWS);
    tiles_end();
}

static void gemm_s8_tiles(const struct fc_gemm *g) { page_s8(g, gemm_s8); }
static void paged_s8_tiles(const struct fc_gemm *g) { page_s8(g, paged_s8); }
