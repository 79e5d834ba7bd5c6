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

/* What a pass over C multiplies: rows [row, row + rows) by lines [line, line + lines) of each panel, tile_lines of them
 * at once. */
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

/* ---- integer formats: 16 rows by one panel, whose float32 accumulators stay in registers ---- */

enum { TILE_SUMS = TILE_ROWS * FC_PANEL, LEAST_TILE_LINES = 8, TILES_OF_SUMS = 4 };

/* Tile c = sum of u q over `lines` lines of a chunk, at_once of them at once; a and b: tiles to load into */
#define FC_TILE_CHUNK(name, c, a, b)                                                                                   \
    FC_INLINE void name(const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t lines, ptrdiff_t at_once) {             \
        tile_zero(c);                                                                                                  \
        for (ptrdiff_t line = 0; line < lines; line += at_once, x += at_once * 4, w += at_once * FC_LINE) {            \
            tile_load(a, x, ldx);                                                                                      \
            tile_load(b, w, FC_LINE);                                                                                  \
            tile_dot_s8u8(c, a, b);                                                                                    \
        }                                                                                                              \
    }
FC_TILE_CHUNK(tile_chunk_0, 0, 4, 6)
FC_TILE_CHUNK(tile_chunk_1, 1, 5, 7)
FC_TILE_CHUNK(tile_chunk_2, 2, 4, 6)
FC_TILE_CHUNK(tile_chunk_3, 3, 5, 7)

/* Tiles c and c + 1 = the same for the two planes of x, which lie one after the other */
#define FC_TILE_PLANES(name, high, low)                                                                                \
    FC_INLINE void name(const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t lines, ptrdiff_t at_once) {             \
        const ptrdiff_t plane = lines * 4;                                                                             \
        tile_zero(high);                                                                                               \
        tile_zero(low);                                                                                                \
        for (ptrdiff_t line = 0; line < lines; line += at_once, x += at_once * 4, w += at_once * FC_LINE) {            \
            tile_load(6, w, FC_LINE);                                                                                  \
            tile_load(4, x, ldx);                                                                                      \
            tile_dot_s8u8(high, 4, 6);                                                                                 \
            tile_load(5, x + plane, ldx);                                                                              \
            tile_dot_s8u8(low, 5, 6);                                                                                  \
        }                                                                                                              \
    }
FC_TILE_PLANES(tile_planes_0, 0, 1)
FC_TILE_PLANES(tile_planes_1, 2, 3)

/* Tile turn % 4, or those of turn % 2 with two planes, = the sums of a chunk at x and w */
FC_INLINE void tile_products(const int two, int turn, const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t lines,
                             ptrdiff_t at_once) {
    if (two) {
        if (turn % 2) tile_planes_1(x, ldx, w, lines, at_once);
        else tile_planes_0(x, ldx, w, lines, at_once);
        return;
    }
    switch (turn % 4) {
    case 0: tile_chunk_0(x, ldx, w, lines, at_once); break;
    case 1: tile_chunk_1(x, ldx, w, lines, at_once); break;
    case 2: tile_chunk_2(x, ldx, w, lines, at_once); break;
    case 3: tile_chunk_3(x, ldx, w, lines, at_once); break;
    }
}

/* sums[4][256]: those of the tiles, as tile_products numbers them */
FC_INLINE void tile_store_sums(const int two, int turn, int32_t sums[][TILE_SUMS]) {
    switch (two ? 4 + turn % 2 : turn % 4) {
    case 0: tile_store(0, sums[0], FC_LINE); break;
    case 1: tile_store(1, sums[1], FC_LINE); break;
    case 2: tile_store(2, sums[2], FC_LINE); break;
    case 3: tile_store(3, sums[3], FC_LINE); break;
    case 4:
        tile_store(0, sums[0], FC_LINE);
        tile_store(1, sums[1], FC_LINE);
        break;
    case 5:
        tile_store(2, sums[2], FC_LINE);
        tile_store(3, sums[3], FC_LINE);
        break;
    }
}

/* What follows a chunk's products: its end in each row of x, its line of scales, and the minima of the group that
 * begins with it, or NULL */
struct tile_end {
    const char *x, *scales, *minima;
    int which;
};

/* y[16] += (start + sums) (x's scale * W's), after the minimum; sums = 128 high + low with two planes. Rows of x are
 * gone through one by one: sixteen addresses would take all registers. */
FC_INLINE void tile_add(gemm_format f, const int two, vf y[TILE_ROWS], int32_t sums[][TILE_SUMS],
                        const struct tile_end *of, ptrdiff_t ldx) {
    vf scale[1];
    if (of->minima) {
        const char *x = of->x;
        int_scales(f, 1, scale, 1, of->minima, 0, 0);
#pragma GCC unroll 16
        for (int i = 0; i < TILE_ROWS; i++, x = opaque(x + ldx))
            y[i] = vf_fma(vf_load1(&chunk_of_row(x, 0, 0)->sum), scale[0], y[i]);
    }
    const char *x = of->x;
    int_scales(f, 1, scale, of->which, of->scales, 0, 0);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++, x = opaque(x + ldx)) {
        const struct fc_chunk *chunk = chunk_of_row(x, 0, 0);
        vi sum = (vi)vf_load(sums[0] + i * FC_PANEL);
        if (two) sum = (sum << 7) + (vi)vf_load(sums[1] + i * FC_PANEL);
        y[i] = vf_fma(vf_from_int(sum + chunk->start), vf_load1(&chunk->scale) * scale[0], y[i]);
    }
}

/* C's 16 rows from `row` on by panel `panel`, whose lines of bytes begin at w, `block_lines` bytes from block to block,
 * and whose lines of scales at s, block_scales apart. A product's sums are long on their way out of the tiles: in each
 * turn one chunk is multiplied, the one before stored, and the one before that added. */
FC_INLINE void tile_chunks(gemm_format f, const int two, const struct fc_gemm *g, ptrdiff_t row, ptrdiff_t panel,
                           const char *w, ptrdiff_t block_lines, const char *s, ptrdiff_t block_scales) {
    const int nibbles = f->bits == 4, minima = nibbles ? f->minimum_bytes > 0 : g->minima;
    const ptrdiff_t lines = nibbles ? FC_CHUNK / 4 : g->lines;
    const ptrdiff_t at_once = lines % TILE_LINES ? LEAST_TILE_LINES : TILE_LINES;
    const ptrdiff_t group_chunks = f->block_groups > 1 ? f->group / FC_CHUNK : g->group_chunks;
    const ptrdiff_t chunks = group_chunks * f->block_groups, ldx = g->ldx;
    const ptrdiff_t integers = lines * 4 * (1 + two), x_step = fc_chunk_bytes(integers, FC_X_ALIGN);
    const int all = (int)(g->blocks * chunks), slots = TILES_OF_SUMS >> two;
    int32_t sums[TILES_OF_SUMS][TILE_SUMS] __attribute__((aligned(FC_LINE)));
    struct tile_end end[TILES_OF_SUMS] = {{0}};
    char *c = (char *)g->c + row * g->ldc + panel * FC_LINE;
    const char *x = (const char *)g->x + row * ldx;
    ptrdiff_t chunk = 0;
    vf y[TILE_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++) y[i] = g->accumulate ? vf_load(c + i * g->ldc) : vf_zero();
    for (int first = 0; first < all + 2; first += TILES_OF_SUMS)
#pragma GCC unroll 4
        for (int i = 0; i < TILES_OF_SUMS; i++) { /* tiles are named by literal numbers */
            const int turn = first + i, before = i + TILES_OF_SUMS - 1, added = i + TILES_OF_SUMS - 2;
            if (turn < all) tile_products(two, i, x, ldx, w + chunk * lines * FC_LINE, lines, at_once);
            if (turn >= 1 && turn <= all) tile_store_sums(two, before, sums);
            if (turn >= 2 && turn < all + 2)
                tile_add(f, two, y, sums + (added % slots << two), &end[added % TILES_OF_SUMS], ldx);
            if (turn >= all) continue;
            end[i] = (struct tile_end){x + integers, s, minima && chunk == 0 ? s + (nibbles ? 0 : FC_LINE) : NULL,
                                       f->block_groups > 1 ? (int)(chunk / group_chunks) : 0};
            x += x_step;
            if (++chunk == chunks) chunk = 0, w += block_lines, s += block_scales;
        }
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++) vf_store(c + i * g->ldc, y[i]);
}

/* Lines of a panel that are unpacked at once: bytes that stay in L1 while all rows pass */
enum { UNPACKED_LINES = 256 };

/* Whether rows go through tiles: whole ones of them, and of k. Sums of integers are exact, so the others, by gemm.h,
 * have the same bits. */
FC_INLINE ptrdiff_t tile_whole_rows(const struct fc_gemm *g, ptrdiff_t chunk_lines) {
    return chunk_lines % LEAST_TILE_LINES ? 0 : g->m / TILE_ROWS * TILE_ROWS;
}

FC_INLINE void tiles_begin_chunks(ptrdiff_t chunk_lines) {
    const struct tile_shapes shapes =
        shapes_of_pairs(TILE_ROWS, chunk_lines % TILE_LINES ? LEAST_TILE_LINES : TILE_LINES);
    tiles_begin(&shapes);
}

/* The rows from `row` on, for the leaf of gemm.h */
FC_INLINE struct fc_gemm rows_from(const struct fc_gemm *g, ptrdiff_t row) {
    struct fc_gemm rest = *g;
    rest.c = (float *)(void *)((char *)g->c + row * g->ldc);
    rest.x = (const char *)g->x + row * g->ldx;
    rest.m = g->m - row;
    return rest;
}

/* Lines of bytes: 16 rows of x stay in L1 while the panels pass, each of which is asked for what comes after it. */
FC_INLINE void tile_bytes(gemm_format f, const int two, const struct fc_gemm *g, void (*few)(const struct fc_gemm *)) {
    const ptrdiff_t rows = tile_whole_rows(g, g->lines), lines = g->group_chunks * g->lines;
    const ptrdiff_t block = (lines + 1 + (g->minima != 0)) * FC_LINE, all = g->blocks * block;
    if (rows) tiles_begin_chunks(g->lines);
    for (ptrdiff_t row = 0; row < rows; row += TILE_ROWS)
        for (ptrdiff_t panel = 0; panel < g->panels; panel++) {
            const char *w = (const char *)g->w + panel * g->panel_stride;
            const ptrdiff_t share = all / FC_LINE * TILE_ROWS / rows;
            for (ptrdiff_t line = 0; line < share; line++)
                __builtin_prefetch(w + all + (row / TILE_ROWS * share + line) * FC_LINE, 0, 2);
            tile_chunks(f, two, g, row, panel, w, block, w + lines * FC_LINE, block);
        }
    if (rows) tiles_end();
    if (rows == g->m) return;
    const struct fc_gemm rest = rows_from(g, rows);
    few(&rest);
}

/* Nibbles to lines of bytes, four k of the low ones, then four of the high ones; block_lines of them, then a line of
 * scales, follow each other. */
FC_INLINE void unpack_nibbles(char *bytes, const char *w, ptrdiff_t blocks, ptrdiff_t block_lines) {
    for (; blocks > 0; blocks--, w += FC_LINE)
        for (ptrdiff_t line = 0; line < block_lines; line++, w += FC_LINE, bytes += 2 * FC_LINE) {
            const vu nibbles = (vu)vf_load(w);
            vf_store(bytes, (vf)(nibbles & 0x0f0f0f0fu));
            vf_store(bytes + FC_LINE, (vf)(nibbles >> 4 & 0x0f0f0f0fu));
        }
}

/* Lines of nibbles: a panel is unpacked once, and all rows pass. */
FC_INLINE void tile_nibbles(gemm_format f, const int two, const struct fc_gemm *g,
                            void (*few)(const struct fc_gemm *)) {
    const ptrdiff_t group_chunks = f->block_groups > 1 ? f->group / FC_CHUNK : g->group_chunks;
    const ptrdiff_t chunks = group_chunks * f->block_groups, lines = chunks * FC_CHUNK / f->k_step;
    const ptrdiff_t block = (lines + 1) * FC_LINE, at_once = UNPACKED_LINES / (2 * lines);
    const ptrdiff_t x_block = chunks * fc_chunk_bytes(FC_CHUNK * (1 + two), FC_X_ALIGN);
    const ptrdiff_t rows = at_once ? tile_whole_rows(g, FC_CHUNK / 4) : 0;
    char bytes[UNPACKED_LINES * FC_LINE] __attribute__((aligned(FC_LINE)));
    if (rows) tiles_begin_chunks(FC_CHUNK / 4);
    for (ptrdiff_t panel = 0; rows && panel < g->panels; panel++)
        for (ptrdiff_t at = 0; at < g->blocks; at += at_once) {
            const char *w = (const char *)g->w + panel * g->panel_stride + at * block;
            struct fc_gemm part = *g;
            part.x = (const char *)g->x + at * x_block;
            part.blocks = g->blocks - at < at_once ? g->blocks - at : at_once;
            part.accumulate |= at > 0;
            unpack_nibbles(bytes, w, part.blocks, lines);
            for (ptrdiff_t row = 0; row < rows; row += TILE_ROWS)
                tile_chunks(f, two, &part, row, panel, bytes, 2 * lines * FC_LINE, w + lines * FC_LINE, block);
        }
    if (rows) tiles_end();
    if (rows == g->m) return;
    const struct fc_gemm rest = rows_from(g, rows);
    few(&rest);
}

#define FC_TILE_GEMM(name, kind, format)                                                                               \
    static __attribute__((noinline)) void name##_tiles_int(const struct fc_gemm *g) {                                  \
        tile_##kind(format, 0, g, name##_int);                                                                         \
    }                                                                                                                  \
    static __attribute__((noinline)) void name##_tiles_planes(const struct fc_gemm *g) {                               \
        tile_##kind(format, 1, g, name##_planes);                                                                      \
    }                                                                                                                  \
    static void name##_tiles(const struct fc_gemm *g) {                                                                \
        if (g->m < TILE_ROWS) name(g);                                                                                 \
        else (g->planes == 2 ? name##_tiles_planes : name##_tiles_int)(g);                                             \
    }
FC_TILE_GEMM(gemm_u8, bytes, &fc_formats[FC_PACKED_I8])
FC_TILE_GEMM(gemm_i4_symmetric, nibbles, &fc_formats[FC_PACKED_I4_SYMMETRIC])
FC_TILE_GEMM(gemm_i4_affine, nibbles, &fc_formats[FC_PACKED_I4_AFFINE])
