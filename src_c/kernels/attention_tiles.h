/* Prompt attention on tiles: bfloat16 queries against the first keys of a chunk, 32 rows, a strip, at a time.
 *
 * While the products q k^T of a strip are in the tiles, the scores of the strip before become weights, and while its
 * weights V are in there, the largest scores of the next are found: of each row between two steps of tiles, for which a
 * processor has instructions enough in sight. Orders of sums, and hence bits, are those of attention_row and gemm_bf16,
 * whatever lies beside a row. */

enum { STRIP_KEYS = 2 * FC_PANEL, STRIP_SCORES = FC_KV_CHUNK + FC_PANEL };

/* A strip: where its rows of queries, scores, partials, and what each row sees begin; keys that some row sees, in whole
 * tiles. Weights lie where the row's scores began. */
struct strip {
    const char *q;
    float *s, *part, *max, *sum;
    const ptrdiff_t *sees;
    ptrdiff_t keys;
    int row; /* the next one that becomes weights, or whose maximum is found */
};

static struct strip strip_of(const struct fc_attention_strips *t, ptrdiff_t i) {
    const ptrdiff_t row = i * FC_STRIP_ROWS;
    struct strip s = {.q = (const char *)t->q + row * t->ldq, .s = t->scores + i % 2 * FC_STRIP_ROWS * STRIP_SCORES,
                      .part = t->part + row * t->ldp / 4, .max = t->max + row, .sum = t->sum + row,
                      .sees = t->sees + row};
    for (int r = 0; r < FC_STRIP_ROWS; r++) s.keys = s.sees[r] > s.keys ? s.sees[r] : s.keys;
    s.keys = (s.keys + STRIP_KEYS - 1) / STRIP_KEYS * STRIP_KEYS;
    return s;
}

/* The next row's scores become weights, zeros from what it sees on. */
FC_INLINE void strip_weigh_row(struct strip *s, float scale) {
    const int row = s->row++;
    const struct fc_attention_row r = {.s = s->s + row * STRIP_SCORES,
                                       .bf16 = (uint16_t *)(void *)(s->s + row * STRIP_SCORES)};
    const ptrdiff_t n = s->sees[row];
    const float top = s->max[row];
    s->max[row] = scale * top;
    s->sum[row] = vf_sum(bfloat16_weights_of(&r, n, scale, top));
    if (n < s->keys) memset(r.bf16 + n, 0, (size_t)(s->keys - n) * 2);
}

FC_INLINE void strip_max_row(struct strip *s) {
    const int row = s->row++;
    s->max[row] = vf_hmax(max_of(s->s + row * STRIP_SCORES, s->sees[row]));
}

/* Scores of `next`, meanwhile weights of `now`; either may be NULL. */
FC_INLINE void strip_scores(const struct fc_attention_strips *t, const struct strip *next, struct strip *now) {
    const ptrdiff_t steps = next->keys / STRIP_KEYS * t->k_lines / TILE_LINES;
    ptrdiff_t owed = 0;
    for (ptrdiff_t key = 0; key < next->keys; key += STRIP_KEYS) {
        const char *x = next->q, *w = t->k + key / FC_PANEL * t->k_panel;
        tile_clear_pairs();
        for (ptrdiff_t line = 0; line < t->k_lines; line += TILE_LINES, x += FC_LINE, w += TILE_BYTES) {
            tile_pair_step(0, x, t->ldq, w, t->k_panel);
            if (!now) continue;
            for (owed += FC_STRIP_ROWS; owed >= steps && now->row < FC_STRIP_ROWS; owed -= steps)
                strip_weigh_row(now, t->scale);
        }
        tile_store_pairs((char *)(next->s + key), STRIP_SCORES * 4);
    }
}

/* part of `now` = its weights V, meanwhile the largest scores of `next`, which may be NULL */
FC_INLINE void strip_values(const struct fc_attention_strips *t, const struct strip *now, struct strip *next) {
    const ptrdiff_t steps = now->keys / STRIP_KEYS * t->panels / 2;
    ptrdiff_t owed = 0;
    for (ptrdiff_t panel = 0; panel < t->panels; panel += 2) {
        const char *x = (const char *)now->s, *w = t->v + panel * t->v_panel;
        tile_clear_pairs();
        for (ptrdiff_t key = 0; key < now->keys; key += STRIP_KEYS, x += FC_LINE, w += TILE_BYTES) {
            tile_pair_step(0, x, STRIP_SCORES * 4, w, t->v_panel);
            if (!next) continue;
            for (owed += FC_STRIP_ROWS; owed >= steps && next->row < FC_STRIP_ROWS; owed -= steps) strip_max_row(next);
        }
        tile_store_pairs((char *)(now->part + panel * FC_PANEL), t->ldp);
    }
}

static void attention_strips(const struct fc_attention_strips *t) {
    const struct tile_shapes shapes = shapes_of_pairs(TILE_ROWS, TILE_LINES);
    const ptrdiff_t strips = (t->rows + FC_STRIP_ROWS - 1) / FC_STRIP_ROWS;
    struct strip now = strip_of(t, 0), next;
    tiles_begin(&shapes);
    strip_scores(t, &now, NULL);
    while (now.row < FC_STRIP_ROWS) strip_max_row(&now);
    for (ptrdiff_t i = 1; i <= strips; i++) {
        now.row = 0;
        if (i < strips) {
            next = strip_of(t, i);
            strip_scores(t, &next, &now);
        }
        while (now.row < FC_STRIP_ROWS) strip_weigh_row(&now, t->scale);
        strip_values(t, &now, i < strips ? &next : NULL);
        while (i < strips && next.row < FC_STRIP_ROWS) strip_max_row(&next);
        now = next;
    }
    tiles_end();
}
