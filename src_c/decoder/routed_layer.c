/* A layer with a router (mixture of depths, arXiv 2404.02258): the tokens that it chooses go through, packed together,
 * and come back to their places; the others stay as they are. A row may send any number of its tokens, none too, and
 * then no weight of the layer is read. */
#include "pass.h"

struct routing {
    float *logits;   /* (M) */
    float *scores;   /* (M), by which tokens are chosen: the logits themselves, or the predictor's */
    int64_t *tokens; /* (M) which rows of x go through, ascending, `count` of them, */
    float *gate;     /* (M) with these logits, */
    int64_t *positions, *counts, *lens; /* (M) at these positions; (B) of each row; (B) with those that went before */
    ptrdiff_t count;
    int64_t longest; /* of lens */
};

static fc_status logits_of(float *logits, const float *x, const float *weight, ptrdiff_t rows, ptrdiff_t n) {
    const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {rows}, .stride = {{4}, {n * 4}}};
    return fc_router_logits(FC_F32, logits, x, weight, &each, n);
}

/* scores (M) = silu(x up + bias) . down + down_bias */
static fc_status predict(const struct pass *p, const fc_router *router, float *scores, const float *x) {
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)float_bytes(p->rows, router->inner))) return FC_NO_MEMORY;
    float *inner = (float *)(void *)scratch.base; /* (M, inner) */
    fc_status status = project(p, inner, router->inner, x, p->rows, p->hidden, &router->up, p->hidden, router->inner,
                               NULL, NULL);
    if (status == FC_OK) status = activate(inner, FC_SILU, p->rows, router->inner);
    if (status == FC_OK) status = logits_of(scores, inner, router->down, p->rows, router->inner);
    for (ptrdiff_t i = 0; status == FC_OK && i < p->rows; i++) scores[i] += router->down_bias;
    fc_scratch_free(&scratch);
    return status;
}

static void choose(const struct pass *p, float threshold, const fc_routed_state *state, struct routing *r) {
    for (ptrdiff_t b = 0; b < p->batch; b++) {
        const int64_t held = state->held[b];
        int64_t *places = state->positions + b * state->room + held;
        r->counts[b] = 0;
        for (ptrdiff_t i = b * p->seq; i < (b + 1) * p->seq; i++) {
            if (!(r->scores[i] > threshold)) continue;
            places[r->counts[b]++] = p->positions[i];
            r->tokens[r->count] = i;
            r->gate[r->count] = r->logits[i];
            r->positions[r->count++] = p->positions[i];
        }
        r->lens[b] = held + r->counts[b];
        if (r->lens[b] > r->longest) r->longest = r->lens[b];
        state->chosen[b] = r->counts[b];
    }
}

/* x's rows `tokens` = (1 - gate) x + gate layer(x) */
static fc_status through(const struct pass *p, const fc_layer *layer, const fc_routed_state *state, float *x,
                         const struct routing *r) {
    const ptrdiff_t row = p->hidden * 4;
    const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {r->count}, .stride = {{row}, {row}, {row}},
                          .index = {r->tokens, r->tokens}};
    const struct pass packed = {
        .k = p->k, .workspace = p->workspace, .batch = p->batch, .seq = p->seq, .rows = r->count, .hidden = p->hidden,
        .start = state->held, .positions = r->positions, .lens = r->lens, .longest = r->longest, .counts = r->counts,
        .kv_positions = state->positions, .kv_room = state->room};
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)fc_times(2, float_bytes(r->count, p->hidden))))
        return FC_NO_MEMORY;
    float *xs = (float *)(void *)scratch.base, *ys = xs + r->count * p->hidden; /* (count, hidden) */
    fc_status status = fc_embedding(FC_F32, FC_F32, xs, x, r->tokens, r->count, p->hidden, row, 1.0f);
    if (status == FC_OK) status = run_layer(&packed, layer, &state->mixer, xs, ys);
    if (status == FC_OK) status = fc_gate_update(FC_F32, x, x, xs, r->gate, &each, p->hidden);
    fc_scratch_free(&scratch);
    return status;
}

fc_status routed_layer(const struct pass *p, const fc_layer *layer, const fc_routed_state *state, float *x) {
    const fc_router *router = layer->router;
    const ptrdiff_t m = p->rows;
    struct routing r = {0};
    fc_scratch scratch;
    const ptrdiff_t numbers = fc_times(fc_plus(m, p->batch), 16); /* two each of int64 */
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)fc_plus(numbers, float_bytes(m, 3)))) return FC_NO_MEMORY;
    r.tokens = (int64_t *)(void *)scratch.base;
    r.positions = r.tokens + m;
    r.counts = r.positions + m;
    r.lens = r.counts + p->batch;
    r.logits = (float *)(void *)(scratch.base + numbers);
    r.gate = r.logits + m;
    r.scores = router->inner ? r.gate + m : r.logits;
    fc_status status = logits_of(r.logits, x, router->weight, m, p->hidden);
    if (status == FC_OK && router->inner) status = predict(p, router, r.scores, x);
    if (status == FC_OK) choose(p, router->inner ? 0.0f : router->threshold, state, &r);
    if (status == FC_OK && r.count) status = through(p, layer, state, x, &r);
    fc_scratch_free(&scratch);
    return status;
}
