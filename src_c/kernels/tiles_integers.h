/* Integer formats on tiles: 16 rows by one panel, whose float32 accumulators stay in registers.
 *
 * Of a few panels a part, TILE_K of k, is made into an image that stays in the caches while all rows pass: panel after
 * panel, chunk after chunk its lines of signed bytes u - zero (u, with two planes), a line of float32 scales and, with
 * minima, a line of them. All u - zero are bytes: 8 bits have the zero 128, fewer bits have no larger one. */

enum {
    LEAST_TILE_LINES = 8, /* of a chunk */
    TILE_SUMS = TILE_ROWS * FC_LINE,
    TILE_K = 512,
    IMAGE_PANELS = 8,
    FEW_TILE_ROWS = 64, /* for fewer, panels are read one after the other, in order */
    LEAST_ROWS_ALONE = 10, /* of a tile that is not whole, where there is no other one, */
    LEAST_ROWS_MORE = 3,   /* or after whole ones */
    IMAGE_LINES = TILE_K / 4 + TILE_K / FC_CHUNK * 2
};

struct tile_image {
    const char *bytes;
    char *sums;    /* [4][TILE_SUMS]: room for those of two chunks of two planes */
    ptrdiff_t gap; /* bytes between a panel and the next */
    ptrdiff_t panels, chunks, group_chunks, of_group; /* how far into its group the first chunk is */
};

typedef uint8_t vu8 __attribute__((vector_size(FC_BYTES)));
FC_INLINE vu vu_less_bytes(vu a, vu b) { return (vu)((vu8)a - (vu8)b); }

/* y[16] += (sum over the group of x's scale q) minimum */
FC_INLINE void tile_add_minima(vf y[TILE_ROWS], const char *x, ptrdiff_t ldx, const char *minima) {
    const vf minimum = vf_load(minima);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++, x = opaque(x + ldx))
        y[i] = vf_fma(vf_load1(&chunk_of_row(x, 0, 0)->sum), minimum, y[i]);
}

/* y[16] += sums (x's scale * W's); sums = start + 128 high + low with two planes, each [16][16]. x: what follows the
 * chunk's integers. Rows are gone through one by one: sixteen addresses would take all registers. Beside tiles only one
 * unit is left that multiplies or converts, so sums of one plane, less than 2^22, become floats by addition. */
FC_INLINE void tile_add(const int two, vf y[TILE_ROWS], const char *sums, const char *x, ptrdiff_t ldx,
                        const char *scales) {
    const vf scale = vf_load(scales), magic = vf_set1(12582912.0f); /* 1.5 * 2^23 */
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++, x = opaque(x + ldx)) {
        vi sum = (vi)vf_load(sums + i * FC_LINE);
        if (two) sum = (sum << 7) + (vi)vf_load(sums + TILE_SUMS + i * FC_LINE) + chunk_of_row(x, 0, 0)->start;
        const vf value = two ? vf_from_int(sum) : (vf)(sum + (vi)magic) - magic;
        y[i] = vf_fma(value, vf_load1(&chunk_of_row(x, 0, 0)->scale) * scale, y[i]);
    }
}

/* Tiles `high` and `low` = sums of u times the planes of a chunk's x, which lie one after the other; with one plane,
 * FC_CHUNK of k, tile `high` alone = those of u - zero. A tile's name is free again only after what reads it, hence
 * many. */
#define FC_TILE_CHUNK(name, high, low, a, b)                                                                           \
    FC_INLINE void name##_planes(const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t lines) {                       \
        const ptrdiff_t plane = lines * 4, at_once = lines % TILE_LINES ? LEAST_TILE_LINES : TILE_LINES;               \
        tile_zero(high);                                                                                               \
        tile_zero(low);                                                                                                \
        for (ptrdiff_t line = 0; line < lines; line += 2 * at_once) {                                                  \
            tile_load(6, w, FC_LINE);                                                                                  \
            tile_load(4, x, ldx);                                                                                      \
            tile_dot_s8u8(high, 4, 6);                                                                                 \
            tile_load(5, x + plane, ldx);                                                                              \
            tile_dot_s8u8(low, 5, 6);                                                                                  \
            x += at_once * 4, w += at_once * FC_LINE;                                                                  \
            if (line + at_once >= lines) break;                                                                        \
            tile_load(7, w, FC_LINE);                                                                                  \
            tile_load(4, x, ldx);                                                                                      \
            tile_dot_s8u8(high, 4, 7);                                                                                 \
            tile_load(5, x + plane, ldx);                                                                              \
            tile_dot_s8u8(low, 5, 7);                                                                                  \
            x += at_once * 4, w += at_once * FC_LINE;                                                                  \
        }                                                                                                              \
    }                                                                                                                  \
    FC_INLINE void name(const int two, const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t lines) {                 \
        if (two) {                                                                                                     \
            name##_planes(x, ldx, w, lines);                                                                           \
            return;                                                                                                    \
        }                                                                                                              \
        tile_zero(high);                                                                                               \
        tile_load(a, x, ldx);                                                                                          \
        tile_load(b, w, FC_LINE);                                                                                      \
        tile_dot_s8s8(high, a, b);                                                                                     \
    }                                                                                                                  \
    FC_INLINE void name##_store(const int two, char *sums) {                                                           \
        tile_store(high, sums, FC_LINE);                                                                               \
        if (two) tile_store(low, sums + TILE_SUMS, FC_LINE);                                                           \
    }
FC_TILE_CHUNK(tile_even, 0, 1, 4, 6)
FC_TILE_CHUNK(tile_odd, 2, 3, 5, 7)

/* A pointer in a vector register and back: the compiler would put it on the stack, where a load waits for sums that are
 * on their way to an address with the same last bits. */
typedef uint64_t aside __attribute__((vector_size(16)));
FC_INLINE aside put_aside(const char *p) {
    aside a;
    __asm__ volatile("vmovq %1, %0" : "=v"(a) : "r"(p));
    return a;
}
FC_INLINE const char *take_back(aside a) {
    const char *p;
    __asm__ volatile("vmovq %1, %0" : "=r"(p) : "v"(a));
    return p;
}

/* C's 16 rows of a panel to y, or back */
FC_INLINE void tile_move_sums(vf y[TILE_ROWS], char *c, ptrdiff_t ldc, const int back) {
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++, c = (char *)opaque(c + ldc)) {
        if (back) vf_store(c, y[i]);
        else y[i] = vf_load(c);
    }
}
FC_INLINE void tile_begin_sums(vf y[TILE_ROWS], char *c, ptrdiff_t ldc, int accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++) y[i] = vf_zero();
    if (accumulate) tile_move_sums(y, c, ldc, 0);
}

/* C (16, 16 panels) (+)= x times an image. Sums take long to leave a tile: in each turn a chunk is multiplied, the one
 * before stored, and the one before that added, from panel to panel without a pause. */
FC_INLINE void tile_chunks(const int two, const int minima, const ptrdiff_t lines, const struct tile_image *image,
                           const char *x, ptrdiff_t ldx, char *c, ptrdiff_t ldc, int accumulate) {
    const ptrdiff_t integers = lines * 4 * (1 + two), x_step = fc_chunk_bytes(integers, FC_X_ALIGN);
    const ptrdiff_t w_step = (lines + 1 + minima) * FC_LINE, all = image->panels * image->chunks;
    const char *w = image->bytes, *end = x + integers, *const x_end = x + image->chunks * x_step;
    char *const sums = image->sums;
    const char *ends = w + lines * FC_LINE;
    const aside x_begin = put_aside(x), gap = put_aside((const char *)0 + image->gap);
    ptrdiff_t of_group = image->of_group;
    vf y[TILE_ROWS];
    tile_begin_sums(y, c, ldc, accumulate);
    for (ptrdiff_t turn = 0; turn < all + 2; turn += 2)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            const ptrdiff_t chunk = turn + odd;
            if (chunk < all) {
                if (odd) tile_odd(two, x, ldx, w, lines);
                else tile_even(two, x, ldx, w, lines);
                x += x_step;
                if (two) w += w_step;
                if (x == x_end) {
                    x = take_back(x_begin);
                    if (two) w += take_back(gap) - (const char *)0;
                }
            }
            if (!two) w += w_step; /* without gaps: scales are found from w, which saves a register */
            if (chunk >= 1 && chunk <= all) {
                if (odd) tile_even_store(two, (char *)opaque(sums));
                else tile_odd_store(two, (char *)opaque(sums) + 2 * TILE_SUMS);
            }
            if (chunk < 2 || chunk >= all + 2) continue;
            const char *const scales = two ? ends : w - 3 * w_step + lines * FC_LINE;
            if (minima && of_group == 0) tile_add_minima(y, end, ldx, scales + FC_LINE);
            if (minima && ++of_group == image->group_chunks) of_group = 0;
            tile_add(two, y, sums + odd * 2 * TILE_SUMS, end, ldx, scales);
            end += x_step, ends += w_step;
            if (end != x_end + integers) continue;
            if (two) ends += take_back(gap) - (const char *)0;
            end = take_back(x_begin) + integers;
            if (minima) of_group = image->of_group;
            tile_move_sums(y, c, ldc, 1);
            c += FC_LINE;
            if (chunk < all + 1) tile_begin_sums(y, c, ldc, accumulate);
        }
}

/* Each is a function of its own, for its registers, which do not suffice if lines vary. */
typedef void tile_product(const struct tile_image *image, const char *x, ptrdiff_t ldx, char *c, ptrdiff_t ldc,
                          int accumulate);
#define FC_TILE_PRODUCT(name, two, minima, lines)                                                                      \
    static __attribute__((noinline)) void name(const struct tile_image *image, const char *x, ptrdiff_t ldx, char *c,  \
                                               ptrdiff_t ldc, int accumulate) {                                        \
        tile_chunks(two, minima, lines, image, x, ldx, c, ldc, accumulate);                                            \
    }
FC_TILE_PRODUCT(tile_one, 0, 0, 8)
FC_TILE_PRODUCT(tile_one_minima, 0, 1, 8)
FC_TILE_PRODUCT(tile_two_8, 1, 0, 8)
FC_TILE_PRODUCT(tile_two_8_minima, 1, 1, 8)
FC_TILE_PRODUCT(tile_two_16, 1, 0, 16)
FC_TILE_PRODUCT(tile_two_32, 1, 0, 32)

/* NULL: for other chunks there are none. */
FC_INLINE tile_product *tile_product_of(const int two, int minima, ptrdiff_t lines) {
    if (lines == 8) return two ? minima ? tile_two_8_minima : tile_two_8 : minima ? tile_one_minima : tile_one;
    if (!two || minima) return NULL;
    return lines == 16 ? tile_two_16 : lines == 32 ? tile_two_32 : NULL;
}

/* A chunk's lines as signed bytes u - zero: of nibbles four k of the low ones, then four of the high ones */
FC_INLINE void image_lines(gemm_format f, char *to, const char *w, ptrdiff_t lines, vu zero) {
    for (; lines > 0; lines -= f->bits == 4 ? 2 : 1, w += FC_LINE) {
        const vu line = (vu)vf_load(w), low = f->bits == 4 ? line & 0x0f0f0f0fu : line;
        vf_store(to, (vf)vu_less_bytes(low, zero));
        to += FC_LINE;
        if (f->bits == 8) continue;
        vf_store(to, (vf)vu_less_bytes(line >> 4 & 0x0f0f0f0fu, zero));
        to += FC_LINE;
    }
}

/* Where chunks of a panel lie */
struct tile_blocks {
    ptrdiff_t chunks, group_chunks; /* of a block, of a group */
    ptrdiff_t chunk_bytes, bytes;   /* lines of a chunk, a block */
    int minima, zero;
};

/* The image of chunks [first, first + chunks) of the panel at w, to `to`; returns what comes after it. */
FC_INLINE char *image_panel(gemm_format f, char *to, const char *w, ptrdiff_t lines, ptrdiff_t first, ptrdiff_t chunks,
                            const struct tile_blocks *b) {
    const vu zero = (vu){0} + (uint32_t)b->zero * 0x01010101u;
    const char *block = w + first / b->chunks * b->bytes;
    ptrdiff_t in_block = first % b->chunks;
    for (; chunks > 0; chunks--) {
        const char *end = block + b->chunks * b->chunk_bytes;
        vf scale[1];
        image_lines(f, to, block + in_block * b->chunk_bytes, lines, zero);
        to += lines * FC_LINE;
        int_scales(f, 1, scale, f->block_groups > 1 ? (int)in_block / (f->group / FC_CHUNK) : 0, end, 0, 0);
        vf_store(to, scale[0]);
        to += FC_LINE;
        if (b->minima) {
            int_scales(f, 1, scale, 1, f->bits == 4 ? end : end + FC_LINE, 0, 0);
            vf_store(to, scale[0]);
            to += FC_LINE;
        }
        if (++in_block == b->chunks) in_block = 0, block += b->bytes;
    }
    return to;
}

/* A leaf's way through its panels and their parts */
struct tile_parts {
    struct tile_blocks blocks;
    struct tile_image image;
    char *bytes; /* room for it */
    ptrdiff_t lines, x_step, rows;     /* of a chunk; those of all tiles */
    ptrdiff_t chunks, at_once, panels; /* chunks of a panel, of a part; panels of a part */
    tile_product *product;
};

FC_INLINE ptrdiff_t panels_of_part(const struct fc_gemm *g, const struct tile_parts *p, ptrdiff_t panel) {
    return g->panels - panel < p->panels ? g->panels - panel : p->panels;
}

/* Into L2, of `lines` lines of each panel from w on, the share of a tile of rows from `row` on */
FC_INLINE void prefetch_lines_of(const char *w, ptrdiff_t stride, ptrdiff_t panels, ptrdiff_t lines, ptrdiff_t row,
                                 ptrdiff_t rows) {
    const ptrdiff_t from = lines * row / rows, to = lines * (row + TILE_ROWS) / rows;
    for (; panels > 0; panels--, w += stride)
        for (ptrdiff_t line = from; line < to; line++) __builtin_prefetch(w + line * FC_LINE, 0, 2);
}

/* While a part is multiplied, the next one is asked for: of these panels, of the next ones, or, in the end, of the next
 * block of k. */
FC_INLINE void prefetch_part(const struct fc_gemm *g, const struct tile_parts *p, ptrdiff_t panel, ptrdiff_t at,
                             ptrdiff_t row) {
    const ptrdiff_t bytes = p->blocks.bytes, chunks = p->blocks.chunks;
    const ptrdiff_t part = (p->at_once * bytes / chunks + FC_LINE - 1) / FC_LINE;
    at += p->at_once;
    if (at >= p->chunks) {
        at = 0, panel += p->panels;
        if (panel >= g->panels) at = p->chunks, panel = 0;
    }
    prefetch_lines_of((const char *)g->w + panel * g->panel_stride + at / chunks * bytes, g->panel_stride,
                      panels_of_part(g, p, panel), part, row, p->rows);
}

/* Chunks [at, at + at_once) of a few panels, for all rows */
FC_INLINE void tile_part(gemm_format f, const struct fc_gemm *g, struct tile_parts *p, ptrdiff_t panel, ptrdiff_t at) {
    char *to = p->bytes;
    p->image.panels = panels_of_part(g, p, panel);
    p->image.chunks = p->chunks - at < p->at_once ? p->chunks - at : p->at_once;
    p->image.of_group = at % p->image.group_chunks;
    for (ptrdiff_t i = panel; i < panel + p->image.panels; i++)
        to = image_panel(f, to, (const char *)g->w + i * g->panel_stride, p->lines, at, p->image.chunks, &p->blocks);
    for (ptrdiff_t row = 0; row < p->rows; row += TILE_ROWS) {
        prefetch_part(g, p, panel, at, row);
        p->product(&p->image, (const char *)g->x + row * g->ldx + at * p->x_step, g->ldx,
                   (char *)g->c + row * g->ldc + panel * FC_LINE, g->ldc, g->accumulate || at);
    }
}

/* Two planes of bytes, a chunk that is a group: it lies with its scales as in an image already, for which few rows
 * would hardly pay. */
FC_INLINE void tile_part_in_place(const struct fc_gemm *g, struct tile_parts *p, ptrdiff_t at) {
    const ptrdiff_t step = p->blocks.bytes, chunks = p->chunks - at < p->at_once ? p->chunks - at : p->at_once;
    p->image.chunks = chunks;
    p->image.gap = g->panel_stride - chunks * step;
    for (ptrdiff_t row = 0; row < p->rows; row += TILE_ROWS)
        for (ptrdiff_t panel = 0; panel < g->panels; panel += p->panels) {
            p->image.bytes = (const char *)g->w + panel * g->panel_stride + at * step;
            p->image.panels = panels_of_part(g, p, panel);
            prefetch_lines_of(p->image.bytes + chunks * step, g->panel_stride, p->image.panels,
                              chunks * step / FC_LINE, row, p->rows);
            p->product(&p->image, (const char *)g->x + row * g->ldx + at * p->x_step, g->ldx,
                       (char *)g->c + row * g->ldc + panel * FC_LINE, g->ldc, g->accumulate || at);
        }
}

FC_INLINE struct tile_blocks tile_blocks_of(gemm_format f, const int two, const struct fc_gemm *g, ptrdiff_t lines) {
    const int nibbles = f->bits == 4;
    struct tile_blocks b = {.group_chunks = f->block_groups > 1 ? f->group / FC_CHUNK : g->group_chunks,
                            .chunk_bytes = lines * 4 / f->k_step * FC_LINE,
                            .minima = nibbles ? f->minimum_bytes > 0 : g->minima,
                            .zero = two ? 0 : nibbles ? f->zero : g->zero};
    b.chunks = b.group_chunks * f->block_groups;
    b.bytes = b.chunks * b.chunk_bytes + (nibbles ? 1 : 1 + b.minima) * FC_LINE;
    return b;
}

/* Rows that go through tiles, of which the last may have rows that nobody wants. Where there is an image to be made,
 * that is no faster. */
FC_INLINE ptrdiff_t rows_in_tiles(const struct fc_gemm *g, int in_place) {
    const ptrdiff_t whole = g->m / TILE_ROWS * TILE_ROWS, least = whole ? LEAST_ROWS_MORE : LEAST_ROWS_ALONE;
    return in_place && g->m - whole >= least ? whole + TILE_ROWS : whole;
}

/* Sums of integers are exact, so rows that go through no tiles, by gemm_integers.h, have the same bits. */
FC_INLINE void tile_integers(gemm_format f, const int two, const struct fc_gemm *g,
                             void (*few)(const struct fc_gemm *)) {
    const ptrdiff_t lines = f->bits == 4 ? FC_CHUNK / 4 : g->lines;
    struct tile_parts p = {.blocks = tile_blocks_of(f, two, g, lines), .lines = lines};
    p.product = tile_product_of(two, p.blocks.minima, lines);
    const int in_place = two && f->bits == 8 && p.blocks.chunks == 1;
    if (p.product && g->blocks) p.rows = rows_in_tiles(g, in_place);
    if (p.rows) {
        char bytes[IMAGE_PANELS * IMAGE_LINES * FC_LINE] __attribute__((aligned(FC_LINE)));
        char sums[4 * TILE_SUMS] __attribute__((aligned(FC_LINE)));
        const struct tile_shapes shapes =
            shapes_of_pairs(TILE_ROWS, lines % TILE_LINES ? LEAST_TILE_LINES : TILE_LINES);
        p.bytes = bytes;
        p.image = (struct tile_image){.bytes = bytes, .sums = sums, .group_chunks = p.blocks.group_chunks};
        p.x_step = fc_chunk_bytes(lines * 4 * (1 + two), FC_X_ALIGN);
        p.chunks = g->blocks * p.blocks.chunks;
        p.at_once = TILE_K / (lines * 4);
        p.panels = p.rows < FEW_TILE_ROWS ? 1 : IMAGE_PANELS;
        tiles_begin(&shapes);
        if (in_place)
            for (ptrdiff_t at = 0; at < p.chunks; at += p.at_once) tile_part_in_place(g, &p, at);
        else
            for (ptrdiff_t panel = 0; panel < g->panels; panel += p.panels)
                for (ptrdiff_t at = 0; at < p.chunks; at += p.at_once) tile_part(f, g, &p, panel, at);
        tiles_end();
    }
    if (p.rows >= g->m) return;
    struct fc_gemm rest = *g;
    rest.c = (float *)(void *)((char *)g->c + p.rows * g->ldc);
    rest.x = (const char *)g->x + p.rows * g->ldx;
    rest.m = g->m - p.rows;
    few(&rest);
}

#define FC_TILE_GEMM(name, format)                                                                                     \
    static __attribute__((noinline)) void name##_tiles_int(const struct fc_gemm *g) {                                  \
        tile_integers(format, 0, g, name##_int);                                                                       \
    }                                                                                                                  \
    static __attribute__((noinline)) void name##_tiles_planes(const struct fc_gemm *g) {                               \
        tile_integers(format, 1, g, name##_planes);                                                                    \
    }                                                                                                                  \
    static void name##_tiles(const struct fc_gemm *g) {                                                                \
        if (g->m < LEAST_ROWS_ALONE) name(g);                                                                          \
        else (g->planes == 2 ? name##_tiles_planes : name##_tiles_int)(g);                                             \
    }
FC_TILE_GEMM(gemm_u8, &fc_formats[FC_PACKED_I8])
FC_TILE_GEMM(gemm_i4_symmetric, &fc_formats[FC_PACKED_I4_SYMMETRIC])
FC_TILE_GEMM(gemm_i4_affine, &fc_formats[FC_PACKED_I4_AFFINE])
