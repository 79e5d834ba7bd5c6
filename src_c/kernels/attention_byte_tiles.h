/* Prompt attention in bytes on tiles: 32 rows of queries, a strip, at a time against a chunk of keys.
 *
 * As in attention_tiles.h: while the products q k of a strip are in the tiles, the scores of the strip before become
 * weights, and while its weights V are in there, the scores of the next are scaled, between two steps of tiles. Sums of
 * bytes are exact, and what is float is attention_bytes.h's, in its order. */

enum {
    BYTE_PAIR_KEYS = 2 * FC_BYTE_BLOCK,      /* of a step of weights V: two scales */
    BYTE_SUMS = 2 * FC_STRIP_ROWS * FC_LINE, /* its sums: two blocks of 32 rows of a panel */
    LD_BLOCK_SUMS = FC_STRIP_ROWS * FC_LINE
};

/* A strip: its first row and rows, keys that some row sees, and the next row that a step of softmax is for */
struct byte_strip {
    const struct fc_byte_row *rows;
    float *max, *sum;
    ptrdiff_t first, count, lo, hi, row;
    float inverses[FC_STRIP_ROWS][FC_BYTE_BLOCKS];
};

static void byte_strip_of(struct byte_strip *s, const struct fc_byte_strips *t, ptrdiff_t i) {
    const ptrdiff_t first = i * FC_STRIP_ROWS, left = t->count - first;
    s->rows = t->rows + first, s->max = t->max + first, s->sum = t->sum + first;
    s->first = first, s->count = left < FC_STRIP_ROWS ? left : FC_STRIP_ROWS;
    s->lo = FC_KV_CHUNK, s->hi = 0, s->row = 0;
    for (ptrdiff_t r = 0; r < s->count; r++) {
        const struct fc_byte_row *row = s->rows + r;
        if (row->lo >= row->hi) continue;
        s->lo = row->lo < s->lo ? row->lo : s->lo;
        s->hi = row->hi > s->hi ? row->hi : s->hi;
    }
}

/* The next row's integers become scores, or its scores weights, and those of the row before bytes. Functions of their
 * own, for their registers. */
#define FC_BYTE_STRIP_ROWS(name, plain)                                                                                \
    static __attribute__((noinline)) void byte_score_row##name(struct byte_strip *s) {                                 \
        const ptrdiff_t row = s->row++;                                                                                \
        s->max[row] = row_scores(s->rows + row, plain);                                                                \
    }                                                                                                                  \
    static __attribute__((noinline)) void byte_weigh_row##name(struct byte_strip *s) {                                 \
        const ptrdiff_t row = s->row++;                                                                                \
        if (row < s->count) s->sum[row] = row_values(s->rows + row, s->max[row], s->inverses[row], plain);             \
        if (row > 0) row_bytes(s->rows + row - 1, s->inverses[row - 1]);                                               \
        if (row > 0 && (plain)) s->max[row - 1] *= 0.693147181f;                                                       \
    }
FC_BYTE_STRIP_ROWS(_plain, 1)
FC_BYTE_STRIP_ROWS(_capped, 0)
FC_INLINE void byte_strip_score_row(struct byte_strip *s, const int plain) {
    (plain ? byte_score_row_plain : byte_score_row_capped)(s);
}
FC_INLINE void byte_strip_weigh_row(struct byte_strip *s, const int plain) {
    (plain ? byte_weigh_row_plain : byte_weigh_row_capped)(s);
}

/* Tile t's sums go to `before`, if there is one, and others begin in it: a sum is ready long after the last product is
 * asked for, so what waits for it comes as late as it can. */
#define FC_BYTE_TURN(t, before, offset, ld, begin)                                                                     \
    if (before) tile_store(t, (before) + (offset), ld);                                                                \
    begin;

/* Tiles 0 .. 3 += x w, 32 rows by two panels; the first step of sums, if `start` is not NULL */
FC_INLINE void byte_pair_step(const char *x, ptrdiff_t ldx, const char *w, ptrdiff_t stride, const char *start,
                              char *before, ptrdiff_t ld) {
    tile_load(4, x, ldx);
    tile_load_once(6, w, FC_LINE);
    if (start) { FC_BYTE_TURN(0, before, 0, ld, tile_load(0, start, 0)) }
    tile_dot_u8s8(0, 4, 6);
    tile_load_once(7, w + stride, FC_LINE);
    if (start) { FC_BYTE_TURN(1, before, FC_LINE, ld, tile_load(1, start + FC_LINE, 0)) }
    tile_dot_u8s8(1, 4, 7);
    tile_load(5, x + TILE_ROWS * ldx, ldx);
    if (start) { FC_BYTE_TURN(2, before, TILE_ROWS * ld, ld, tile_load(2, start, 0)) }
    tile_dot_u8s8(2, 5, 6);
    if (start) { FC_BYTE_TURN(3, before, TILE_ROWS * ld + FC_LINE, ld, tile_load(3, start + FC_LINE, 0)) }
    tile_dot_u8s8(3, 5, 7);
}

/* Scores of `next` as integers, meanwhile weights of `now`; either may see nothing. */
FC_INLINE void byte_strip_scores(const struct fc_byte_strips *t, const struct byte_strip *next, struct byte_strip *now,
                                 const int plain) {
    const ptrdiff_t from = next->lo / STRIP_KEYS * STRIP_KEYS, turns = now ? now->count + 1 : 0;
    const ptrdiff_t steps = (next->hi - from + STRIP_KEYS - 1) / STRIP_KEYS * t->k_lines / TILE_LINES;
    ptrdiff_t owed = 0;
    char *before = NULL;
    for (ptrdiff_t key = from; key < next->hi; key += STRIP_KEYS) {
        const char *x = (const char *)t->q + next->first * t->ldq, *w = t->k + key / FC_PANEL * t->k_panel;
        const char *start = (const char *)(t->start + key);
        for (ptrdiff_t line = 0; line < t->k_lines; line += TILE_LINES, x += FC_LINE, w += TILE_BYTES) {
            byte_pair_step(x, t->ldq, w, t->k_panel, start, before, t->ld_s);
            start = NULL;
            for (owed += turns; owed >= steps; owed -= steps) byte_strip_weigh_row(now, plain);
        }
        before = (char *)(next->rows->s + key);
    }
    if (before) tile_store_pairs(before, t->ld_s);
    while (now && now->row < turns) byte_strip_weigh_row(now, plain);
}

/* Sums of a step of weights V, and where they belong: c and scales (two of a row's) of a strip's first row */
struct byte_sums {
    char *sums, *c;
    const float *scale;
    ptrdiff_t rows, ldc;
    int first; /* of c's */
};

/* c (rows) (+)= scale sums of the two blocks */
FC_INLINE void byte_add(const struct byte_sums *b, const int first) {
    const char *sums = b->sums, *end = sums + b->rows * FC_LINE;
    const float *scale = b->scale;
    for (char *c = b->c; sums < end; sums += FC_LINE, c += b->ldc, scale += FC_BYTE_BLOCKS) {
        const vf low = vf_from_int((vi)vf_load(sums)), high = vf_from_int((vi)vf_load(sums + LD_BLOCK_SUMS));
        const vf y = vf_fma(low, vf_set1(scale[0]), first ? vf_zero() : vf_load(c));
        vf_store(c, vf_fma(high, vf_set1(scale[1]), y));
    }
}
static __attribute__((noinline)) void byte_add_sums(const struct byte_sums *b) {
    const struct byte_sums local = *b; /* in registers: no store through c changes it */
    if (local.first) byte_add(&local, 1);
    else byte_add(&local, 0);
}

/* Tiles 0 .. 3 = weights x, 32 rows of two blocks of keys, by these of a panel of values w; their sums before go to
 * `before` */
FC_INLINE void byte_values_step(const char *x, ptrdiff_t ldx, const char *w, char *before) {
    tile_load_once(6, w, FC_LINE);
    tile_load(4, x, ldx);
    FC_BYTE_TURN(0, before, 0, FC_LINE, tile_zero(0))
    tile_dot_u8s8(0, 4, 6);
    tile_load(5, x + TILE_ROWS * ldx, ldx);
    FC_BYTE_TURN(1, before, TILE_ROWS * FC_LINE, FC_LINE, tile_zero(1))
    tile_dot_u8s8(1, 5, 6);
    tile_load_once(7, w + TILE_BYTES, FC_LINE);
    tile_load(4, x + FC_LINE, ldx);
    FC_BYTE_TURN(2, before, LD_BLOCK_SUMS, FC_LINE, tile_zero(2))
    tile_dot_u8s8(2, 4, 7);
    tile_load(5, x + TILE_ROWS * ldx + FC_LINE, ldx);
    FC_BYTE_TURN(3, before, LD_BLOCK_SUMS + TILE_ROWS * FC_LINE, FC_LINE, tile_zero(3))
    tile_dot_u8s8(3, 5, 7);
}

FC_INLINE void byte_store_sums(char *sums) {
    tile_store(0, sums, FC_LINE);
    tile_store(1, sums + TILE_ROWS * FC_LINE, FC_LINE);
    tile_store(2, sums + LD_BLOCK_SUMS, FC_LINE);
    tile_store(3, sums + LD_BLOCK_SUMS + TILE_ROWS * FC_LINE, FC_LINE);
}

/* part of `now` = its weights V, meanwhile scores of `next`, which may be NULL */
FC_INLINE void byte_strip_values(const struct fc_byte_strips *t, const struct byte_strip *now, struct byte_strip *next,
                                 const int plain) {
    char room[2 * BYTE_SUMS] __attribute__((aligned(FC_LINE)));
    const ptrdiff_t from = now->lo / BYTE_PAIR_KEYS * BYTE_PAIR_KEYS, turns = next ? next->count : 0;
    const ptrdiff_t steps = (now->hi - from + BYTE_PAIR_KEYS - 1) / BYTE_PAIR_KEYS * t->panels;
    struct byte_sums before = {0};
    ptrdiff_t owed = 0, step = 0;
    for (ptrdiff_t panel = 0; panel < t->panels; panel++)
        for (ptrdiff_t key = from; key < now->hi; key += BYTE_PAIR_KEYS, step++) {
            byte_values_step((const char *)now->rows->w + key, t->ld_w, t->v + panel * t->v_panel + key * FC_PANEL,
                             before.sums);
            if (step) byte_add_sums(&before);
            before = (struct byte_sums){
                .sums = room + step % 2 * BYTE_SUMS, .c = (char *)t->part + now->first * t->ldp + panel * FC_LINE,
                .scale = now->rows->w_scale + key / FC_BYTE_BLOCK, .rows = now->count, .ldc = t->ldp,
                .first = key == from};
            for (owed += turns; owed >= steps; owed -= steps) byte_strip_score_row(next, plain);
        }
    if (step) {
        byte_store_sums(before.sums);
        byte_add_sums(&before);
    }
    while (next && next->row < turns) byte_strip_score_row(next, plain);
}

FC_INLINE void byte_strips_of(const struct fc_byte_strips *t, const int plain) {
    const struct tile_shapes shapes = shapes_of_pairs(TILE_ROWS, TILE_LINES);
    const ptrdiff_t strips = (t->count + FC_STRIP_ROWS - 1) / FC_STRIP_ROWS;
    struct byte_strip two[2];
    byte_strip_of(&two[0], t, 0);
    tiles_begin(&shapes);
    byte_strip_scores(t, &two[0], NULL, plain);
    while (two[0].row < two[0].count) byte_strip_score_row(&two[0], plain);
    for (ptrdiff_t i = 1; i <= strips; i++) {
        struct byte_strip *now = &two[(i - 1) % 2], *next = &two[i % 2];
        now->row = 0;
        if (i < strips) {
            byte_strip_of(next, t, i);
            byte_strip_scores(t, next, now, plain);
        } else {
            while (now->row <= now->count) byte_strip_weigh_row(now, plain);
        }
        byte_strip_values(t, now, i < strips ? next : NULL, plain);
    }
    tiles_end();
}

static __attribute__((noinline)) void byte_strips_capped(const struct fc_byte_strips *t) { byte_strips_of(t, 0); }

static void byte_strips(const struct fc_byte_strips *t) {
    if (t->rows->softcap > 0.0f) byte_strips_capped(t);
    else byte_strips_of(t, 1);
}
