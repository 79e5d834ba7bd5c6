/* Decoder blocks, op after op, inside one parallel region: no Python and no region between the ops of a token.
 * Which ops, and in what order, is all that this file knows. */
#include "rows.h"

struct decode {
    const fc_block *blocks;
    const fc_block_cache *caches;
    ptrdiff_t n;
    float *x; /* (B, S, hidden) */
    ptrdiff_t batch, seq;
    const int64_t *start;
    /* scratch */
    int64_t *positions; /* (B, S) */
    int64_t *lens;  /* (B) tokens of a row with the new ones */
    int64_t longest;
    float *qkv;     /* (M, A + 2 C) */
    float *heads;   /* (M, A) */
    float *inner;   /* (M, inner) */
    float *part;    /* (M, hidden) */
};

static fc_rows one_stride(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t x, ptrdiff_t residual) {
    return (fc_rows){.size = sizeof(fc_rows), .ndim = 1, .shape = {rows}, .stride = {{out * 4}, {x * 4}, {residual * 4}}};
}

/* out (M, n) = norm(x (M, k)) W + bias + residual, or the gated pair */
static fc_status project(const struct decode *d, const fc_block *b, float *out, const float *x, const fc_matrix *w,
                         ptrdiff_t k, ptrdiff_t n, const float *norm, const float *residual, int gated) {
    const fc_rows rows = one_stride(d->batch * d->seq, n, k, n);
    return fc_linear(&(fc_linear_args){
        .size = sizeof(fc_linear_args), .type = FC_F32, .out = out, .x = x, .residual = residual, .rows = &rows, .m = d->batch * d->seq, .k = k, .n = n,
        .layout = w->layout, .weight = w->data, .group = w->group, .norm = norm, .norm_eps = b->eps,
        .norm_offset = b->norm_offset, .bias = w->bias, .gated = gated, .activation = b->activation});
}

/* x (M, hidden) += residual_scale * post(y (M, k) W) */
static fc_status add_projection(const struct decode *d, const fc_block *b, const float *y, const fc_matrix *w,
                                ptrdiff_t k, const float *post) {
    const ptrdiff_t rows = d->batch * d->seq, n = b->hidden;
    if (!post && b->residual_scale == 1.0f) return project(d, b, d->x, y, w, k, n, NULL, d->x, 0);
    fc_status status = project(d, b, d->part, y, w, k, n, NULL, NULL, 0);
    const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {rows}, .stride = {{n * 4}, {0}, {n * 4}, {0}}};
    if (status == FC_OK && post)
        status = fc_rms_norm(FC_F32, d->part, NULL, d->part, NULL, post, &each, n, b->eps, b->norm_offset);
    for (ptrdiff_t i = 0; status == FC_OK && i < rows * n; i++) d->x[i] += b->residual_scale * d->part[i];
    return status;
}

/* RMSNorm over each of `heads` heads of qkv, from head `first` on */
static fc_status norm_heads(const struct decode *d, const fc_block *b, const float *weight, ptrdiff_t first,
                            ptrdiff_t heads) {
    const ptrdiff_t row = (b->heads + 2 * b->kv_heads) * b->head_dim * 4, head = b->head_dim * 4;
    float *from = d->qkv + first * b->head_dim;
    const fc_rows rows = {.size = sizeof rows, .ndim = 2, .shape = {d->batch * d->seq, heads},
                          .stride = {{row, head}, {0, 0}, {row, head}, {0, 0}}};
    return fc_rms_norm(FC_F32, from, NULL, from, NULL, weight, &rows, b->head_dim, b->eps, 0.0f);
}

/* RoPE on the queries; keys turn on their way into the cache */
static fc_status turn(const struct decode *d, const fc_block *b) {
    const ptrdiff_t row = (b->heads + 2 * b->kv_heads) * b->head_dim * 4;
    return fc_rope(&(fc_rope_args){
        .size = sizeof(fc_rope_args), .type = FC_F32, .out = d->qkv, .x = d->qkv, .cos = b->cos, .sin = b->sin, .positions = d->positions,
        .positions_stride = d->seq, .batch = d->batch, .seq = d->seq, .heads = b->heads, .head_dim = b->head_dim,
        .half = b->half, .x_stride = {d->seq * row, row, b->head_dim * 4},
        .out_stride = {d->seq * row, row, b->head_dim * 4}});
}

static fc_status append(const struct decode *d, const fc_block *b, const fc_block_cache *c) {
    const ptrdiff_t row = (b->heads + 2 * b->kv_heads) * b->head_dim * 4, head = b->head_dim * 4;
    const float *k = d->qkv + b->heads * b->head_dim;
    return fc_append(&(fc_append_args){
        .size = sizeof(fc_append_args), .cache = &c->kv, .type = FC_F32, .k = k, .v = k + b->kv_heads * b->head_dim, .k_stride = {d->seq * row, row, head},
        .v_stride = {d->seq * row, row, head}, .batch = d->batch, .seq = d->seq, .start = d->start, .cos = b->cos,
        .sin = b->sin, .half = b->half});
}

static fc_status attend(const struct decode *d, const fc_block *b, const fc_block_cache *c) {
    const ptrdiff_t row = (b->heads + 2 * b->kv_heads) * b->head_dim * 4, head = b->head_dim * 4;
    return fc_attention(&(fc_attention_args){
        .size = sizeof(fc_attention_args), .q_type = FC_F32, .out = d->heads, .q = d->qkv, .cache = &c->kv, .batch = d->batch, .q_len = d->seq,
        .kv_len = d->longest, .heads = b->heads, .kv_heads = b->kv_heads, .head_dim = b->head_dim, .v_dim = b->head_dim,
        .q_stride = {d->seq * row, row, head}, .out_stride = {d->seq * b->heads * head, b->heads * head, head},
        .kv_lens = d->lens, .causal = 1, .window = c->window, .scale = b->attention_scale, .softcap = b->softcap});
}

static fc_status attention_part(const struct decode *d, const fc_block *b, const fc_block_cache *c) {
    const ptrdiff_t a = b->heads * b->head_dim, kv = b->kv_heads * b->head_dim;
    fc_status status = project(d, b, d->qkv, d->x, &b->qkv, b->hidden, a + 2 * kv, b->input_norm, NULL, 0);
    if (status == FC_OK && b->q_norm) status = norm_heads(d, b, b->q_norm, 0, b->heads);
    if (status == FC_OK && b->k_norm) status = norm_heads(d, b, b->k_norm, b->heads, b->kv_heads);
    if (status == FC_OK && b->cos) status = turn(d, b);
    if (status == FC_OK) status = append(d, b, c);
    if (status == FC_OK) status = attend(d, b, c);
    if (status == FC_OK) status = add_projection(d, b, d->heads, &b->out, a, b->post_attention_norm);
    return status;
}

static fc_status mlp_part(const struct decode *d, const fc_block *b) {
    fc_status status = project(d, b, d->inner, d->x, &b->gate_up, b->hidden, b->inner, b->mlp_norm, NULL, 1);
    if (status == FC_OK) status = add_projection(d, b, d->inner, &b->down, b->inner, b->post_mlp_norm);
    return status;
}

static fc_status all_blocks(void *ctx) {
    const struct decode *d = ctx;
    fc_status status = FC_OK;
    for (ptrdiff_t i = 0; i < d->n && status == FC_OK; i++) {
        status = attention_part(d, d->blocks + i, d->caches + i);
        if (status == FC_OK) status = mlp_part(d, d->blocks + i);
        if (status == FC_OK && d->batch * d->seq > 1 && fc_interrupted()) status = FC_INTERRUPTED;
    }
    return status;
}

fc_status fc_decode(const fc_block *blocks, const fc_block_cache *caches, ptrdiff_t n, float *x, ptrdiff_t batch,
                    ptrdiff_t seq, const int64_t *start) {
    struct decode d = {.blocks = blocks, .caches = caches, .n = n, .x = x, .batch = batch, .seq = seq, .start = start};
    size_t qkv = 0, heads = 0, inner = 0, part = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const fc_block *b = blocks + i;
        const size_t a = (size_t)(b->heads * b->head_dim), all = a + (size_t)(2 * b->kv_heads * b->head_dim);
        if (all > qkv) qkv = all;
        if (a > heads) heads = a;
        if ((size_t)b->inner > inner) inner = (size_t)b->inner;
        if ((size_t)b->hidden > part) part = (size_t)b->hidden;
    }
    const size_t rows = (size_t)(batch * seq);
    fc_scratch scratch;
    const size_t bytes = ((size_t)batch + rows) * 8 + rows * (qkv + heads + inner + part) * 4;
    if (fc_scratch_alloc(&scratch, 1, bytes)) return FC_NO_MEMORY;
    d.lens = (int64_t *)(void *)scratch.base;
    d.positions = d.lens + batch;
    d.qkv = (float *)(void *)(d.positions + rows);
    d.heads = d.qkv + rows * qkv;
    d.inner = d.heads + rows * heads;
    d.part = d.inner + rows * inner;
    for (ptrdiff_t b = 0; b < batch; b++) {
        d.lens[b] = start[b] + seq;
        if (d.lens[b] > d.longest) d.longest = d.lens[b];
        for (ptrdiff_t i = 0; i < seq; i++) d.positions[b * seq + i] = start[b] + i;
    }
    fc_status status = fc_together(all_blocks, &d);
    fc_scratch_free(&scratch);
    return status;
}
