/* The delta rule (arXiv 2102.11174; gated, arXiv 2412.06464), one head, token after token:
 *     S = decay S,   u = beta (v - S^T k),   S = S + k u^T,   y_r = S^T q_r          S (n, p)
 * u needs the whole of S before any of it changes. So one pass over S does a token's update and its y, and sums what
 * the next token asks of it,  (decay S)^T k = S^T (decay k).  Columns of S that are summed at once lie in `tile`. */

/* Columns p0.. of S, `vectors` (1 or 2) of them, into the tile; next[c][e] = sum over n = e, e + 2, .. of S k */
FC_INLINE void tile_in(const struct fc_head_scan *s, ptrdiff_t p0, int vectors, const float *k, vf next[2][2]) {
    for (ptrdiff_t i = 0; i < s->n; i++) {
        const char *row = s->from ? s->from + i * s->from_n + p0 * 4 : NULL;
#pragma GCC unroll 2
        for (int c = 0; c < vectors; c++) {
            const vf x = row ? vf_get_upto(FC_F32, row, c * FC_N, s->p - p0) : vf_zero();
            vf_store(s->tile + (i * vectors + c) * FC_N, x);
            next[c][i % 2] = vf_fma(x, vf_load1(k + i), next[c][i % 2]);
        }
    }
}

FC_INLINE void tile_out(const struct fc_head_scan *s, ptrdiff_t p0, int vectors) {
    for (ptrdiff_t i = 0; i < s->n; i++)
        for (int c = 0; c < vectors; c++)
            vf_put_upto(FC_F32, s->to + i * s->to_n + p0 * 4, c * FC_N, vf_load(s->tile + (i * vectors + c) * FC_N),
                        s->p - p0);
}

/* What one pass over the tile takes and sums: of even n and of odd n. */
struct delta_pass {
    const float *k, *q, *decays, *next_k; /* (n) */
    vf decay, u[2], y[2][2], next[2][2];
};

FC_INLINE void delta_row(struct delta_pass *d, float *tile, ptrdiff_t i, int e, int vectors, int each_n) {
    const vf k = vf_load1(d->k + i), q = vf_load1(d->q + i), next_k = vf_load1(d->next_k + i);
    const vf decay = each_n ? vf_load1(d->decays + i) : d->decay;
#pragma GCC unroll 2
    for (int c = 0; c < vectors; c++) {
        float *at = tile + (i * vectors + c) * FC_N;
        const vf x = vf_fma(k, d->u[c], decay * vf_load(at));
        vf_store(at, x);
        d->y[c][e] = vf_fma(x, q, d->y[c][e]);
        d->next[c][e] = vf_fma(x, next_k, d->next[c][e]);
    }
}

/* y of another query of the same token, from the tile */
FC_INLINE vf tile_times(const float *tile, const float *q, ptrdiff_t n, int vectors) {
    vf even = vf_zero(), odd = vf_zero();
    ptrdiff_t i = 0;
    for (; i + 2 <= n; i += 2) {
        even = vf_fma(vf_load(tile + i * vectors * FC_N), vf_load1(q + i), even);
        odd = vf_fma(vf_load(tile + (i + 1) * vectors * FC_N), vf_load1(q + i + 1), odd);
    }
    if (i < n) even = vf_fma(vf_load(tile + i * vectors * FC_N), vf_load1(q + i), even);
    return even + odd;
}

FC_INLINE void delta_columns(const struct fc_head_scan *s, ptrdiff_t p0, int vectors, int each_n) {
    /* in registers: stores to the tile might change *s, for all that the compiler knows */
    const ptrdiff_t n = s->n, tokens = s->tokens, width = s->width, of_decay = (1 + s->queries) * s->kind;
    const ptrdiff_t of_decayed = of_decay + each_n * s->kind;
    float *tile = s->tile;
    struct delta_pass d = {.next = {{vf_zero(), vf_zero()}, {vf_zero(), vf_zero()}}};
    tile_in(s, p0, vectors, s->keys + of_decayed, d.next);
    for (ptrdiff_t t = 0; t < tokens; t++) {
        const float *keys = s->keys + t * s->token, *v = s->u + t * width + p0;
        float *y = s->y + t * width + p0;
        d.k = keys, d.q = keys + s->kind, d.decays = keys + of_decay;
        d.next_k = keys + of_decayed + (t + 1 < tokens ? s->token : 0);
        d.decay = each_n ? vf_zero() : vf_load1(s->decay + t);
#pragma GCC unroll 2
        for (int c = 0; c < vectors; c++) {
            d.u[c] = vf_load1(s->beta + t) * (vf_load(v + c * FC_N) - (d.next[c][0] + d.next[c][1]));
            d.y[c][0] = d.y[c][1] = d.next[c][0] = d.next[c][1] = vf_zero();
        }
        ptrdiff_t i = 0;
        for (; i + 2 <= n; i += 2) {
            delta_row(&d, tile, i, 0, vectors, each_n);
            delta_row(&d, tile, i + 1, 1, vectors, each_n);
        }
        if (i < n) delta_row(&d, tile, i, 0, vectors, each_n);
#pragma GCC unroll 2
        for (int c = 0; c < vectors; c++) vf_store(y + c * FC_N, d.y[c][0] + d.y[c][1]);
        for (ptrdiff_t r = 1; r < s->queries; r++)
            for (int c = 0; c < vectors; c++)
                vf_store(y + r * tokens * width + c * FC_N,
                         tile_times(tile + c * FC_N, d.q + r * s->kind, n, vectors));
    }
    tile_out(s, p0, vectors);
}

FC_INLINE void head_delta_any(const struct fc_head_scan *s, int each_n) {
    ptrdiff_t p0 = 0;
    for (; p0 + FC_N < s->p; p0 += 2 * FC_N) delta_columns(s, p0, 2, each_n);
    if (p0 < s->p) delta_columns(s, p0, 1, each_n);
}

static void head_delta(const struct fc_head_scan *s) {
    const uint64_t before = vf_flush_subnormals();
    if (s->decay) head_delta_any(s, 0);
    else head_delta_any(s, 1);
    vf_keep_subnormals(before);
}

/* decay = e^g in place, n of each token; by the delta rule the decayed k too */
static void key_decays(const struct fc_head_scan *s, float *keys) {
    float *decays = keys + (1 + s->queries) * s->kind;
    for (ptrdiff_t t = 0; t < s->tokens; t++) {
        for (ptrdiff_t i = 0; i < s->n; i += FC_N) {
            const ptrdiff_t at = t * s->token + i / FC_PANEL * s->line + i % FC_PANEL;
            const vf decay = vf_exp(vf_load(decays + at));
            vf_store(decays + at, decay);
            if (s->beta) vf_store(decays + s->kind + at, decay * vf_load(keys + at));
        }
    }
}

static void exp_f32(float *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) vf_put_upto(FC_F32, x, i, vf_exp(vf_get_upto(FC_F32, x, i, n)), n);
}
