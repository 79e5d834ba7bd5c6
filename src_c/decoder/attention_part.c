/* FC_ATTENTION: queries, keys and values by one product or more; norms of their heads; RoPE; keys and values into the
 * cache's pages; attention over what it holds; the output projection. */
#include "pass.h"

struct attention_pass {
    const struct pass *p;
    const fc_attention_weights *w;
    const fc_attention_state *s;
    float *qkv;      /* (M, A + 2 C) */
    float *attn_out; /* (M, A) */
    ptrdiff_t row, head; /* bytes of a row and of a head of qkv */
};

static fc_status project_qkv(const struct attention_pass *t, const float *x, const fc_norm *norm) {
    const struct pass *p = t->p;
    const ptrdiff_t width = t->w->width ? t->w->width : p->hidden;
    float *out = t->qkv;
    fc_status status = FC_OK;
    for (int i = 0; i < 3 && t->w->qkv_columns[i] && status == FC_OK; out += t->w->qkv_columns[i++])
        status = project(p, out, t->row / 4, x, p->rows, width, &t->w->qkv[i], width, t->w->qkv_columns[i], norm, NULL);
    return status;
}

static fc_status norm_heads(const struct attention_pass *t, const fc_norm *norm, ptrdiff_t first, ptrdiff_t heads) {
    float *from = t->qkv + first * t->w->head_dim;
    if (norm->kind == FC_NO_NORM) return FC_OK;
    return normalise(from, from, norm, t->p->rows, t->row / 4, heads, t->w->head_dim);
}

/* q, k *= balance: so that keys whose channels differ in size share a scale; what each score is a sum of stays. */
static void balance(const struct attention_pass *t) {
    const float *by = t->w->balance; /* (A + C) */
    const ptrdiff_t n = (t->w->heads + t->w->kv_heads) * t->w->head_dim;
    if (!by || t->s->kv->type != FC_KV_I8) return;
    for (ptrdiff_t r = 0; r < t->p->rows; r++) {
        float *qk = t->qkv + r * (t->row / 4);
        for (ptrdiff_t c = 0; c < n; c++) qk[c] *= by[c];
    }
}

/* Queries; keys are rotated on their way into the cache, unless that holds them at other places than they have, or the
 * caller keeps them. */
static fc_status rotate(const struct attention_pass *t) {
    const struct pass *p = t->p;
    const int keys_too = p->counts || t->s->attend;
    if (!t->s->cos) return FC_OK;
    return fc_rope(&(fc_rope_args){
        .size = sizeof(fc_rope_args), .type = FC_F32, .out = t->qkv, .x = t->qkv, .cos = t->s->cos, .sin = t->s->sin,
        .positions = p->positions, .batch = 1, .seq = p->rows, .heads = t->w->heads + (keys_too ? t->w->kv_heads : 0),
        .head_dim = t->w->head_dim, .rotary_pairs = t->s->rotary_pairs, .x_stride = {0, t->row, t->head},
        .out_stride = {0, t->row, t->head}});
}

/* Rows [b, b + batch) of `seq` tokens each, which begin at `first` of all M; `cache`: of these rows. */
struct some_rows {
    ptrdiff_t b, batch, seq, first;
    fc_kv_cache cache;
};

static fc_status append(const struct attention_pass *t, const struct some_rows *r) {
    const struct pass *p = t->p;
    const float *k = t->qkv + r->first * (t->row / 4) + t->w->heads * t->w->head_dim;
    return fc_append(&(fc_append_args){
        .size = sizeof(fc_append_args), .cache = &r->cache, .type = FC_F32, .k = k,
        .v = k + t->w->kv_heads * t->w->head_dim, .k_stride = {r->seq * t->row, t->row, t->head},
        .v_stride = {r->seq * t->row, t->row, t->head}, .batch = r->batch, .seq = r->seq, .start = p->start + r->b,
        .cos = p->counts ? NULL : t->s->cos, .sin = t->s->sin, .rotary_pairs = t->s->rotary_pairs,
        .workspace = p->workspace});
}

static fc_status attend(const struct attention_pass *t, const struct some_rows *r) {
    const struct pass *p = t->p;
    const fc_attention_weights *w = t->w;
    const ptrdiff_t out_row = w->heads * t->head;
    const int apart = p->counts && w->window; /* without a window the order of tokens says who sees whom */
    return fc_attention(&(fc_attention_args){
        .size = sizeof(fc_attention_args), .q_type = FC_F32, .out = t->attn_out + r->first * (out_row / 4),
        .q = t->qkv + r->first * (t->row / 4), .cache = &r->cache, .batch = r->batch, .q_len = r->seq,
        .kv_len = p->counts ? p->lens[r->b] : p->longest, .heads = w->heads, .kv_heads = w->kv_heads,
        .head_dim = w->head_dim, .v_dim = w->head_dim, .q_stride = {r->seq * t->row, t->row, t->head},
        .out_stride = {r->seq * out_row, out_row, t->head}, .kv_lens = p->lens + r->b,
        .q_positions = apart ? p->positions + r->first : NULL,
        .kv_positions = apart ? p->kv_positions + r->b * p->kv_room : NULL, .causal = 1, .window = w->window,
        .scale = w->scale, .softcap = w->softcap, .workspace = p->workspace,
        .precision = w->precision});
}

/* All rows at once, or one after the other where they have different numbers of tokens; or the caller's attention. */
static fc_status append_and_attend(const struct attention_pass *t) {
    const struct pass *p = t->p;
    if (t->s->attend)
        return t->s->attend(t->s->self, t->attn_out, t->qkv, p->batch, p->seq, t->w->heads, t->w->kv_heads,
                            t->w->head_dim);
    struct some_rows r = {.batch = p->counts ? 1 : p->batch, .seq = p->seq, .cache = *t->s->kv};
    fc_status status = FC_OK;
    for (; r.b < p->batch && status == FC_OK; r.b += r.batch, r.cache.pages += r.batch * r.cache.pages_a_row) {
        if (p->counts) r.seq = p->counts[r.b];
        if (r.seq) status = append(t, &r);
        if (r.seq && status == FC_OK) status = attend(t, &r);
        r.first += r.batch * r.seq;
    }
    return status;
}

fc_status attention_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                         const float *residual) {
    const fc_attention_weights *w = part->weights;
    const ptrdiff_t queries = w->heads * w->head_dim, all = queries + 2 * w->kv_heads * w->head_dim;
    struct attention_pass t = {.p = p, .w = w, .s = state, .row = all * 4, .head = w->head_dim * 4};
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)float_bytes(p->rows, all + queries))) return FC_NO_MEMORY;
    t.qkv = (float *)(void *)scratch.base;
    t.attn_out = t.qkv + p->rows * all;
    fc_status status = project_qkv(&t, x, &part->norm);
    if (status == FC_OK) status = norm_heads(&t, &w->q_norm, 0, w->heads);
    if (status == FC_OK) status = norm_heads(&t, &w->k_norm, w->heads, w->kv_heads);
    balance(&t);
    if (status == FC_OK) status = rotate(&t);
    if (status == FC_OK) status = append_and_attend(&t);
    if (status == FC_OK) status = project_out(p, part, out, t.attn_out, queries, &w->out, queries, residual);
    fc_scratch_free(&scratch);
    return status;
}
