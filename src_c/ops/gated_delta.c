/* Linear attention with a decay, the delta rule, or both, in time order: see heads.h. An item is a head of v; it serves
 * several heads of q, or shares its head of k or q with its neighbours. */
#include "heads.h"

static const char *token_of(const void *x, const ptrdiff_t *stride, const struct head_block *at, ptrdiff_t head) {
    return (const char *)x + at->b * stride[0] + at->start * stride[1] + head * stride[2];
}

static const char *k_of(const struct head_block *at) {
    const fc_gated_delta_args *a = at->heads->args;
    return token_of(a->k, a->k_stride, at, at->h / (a->heads / a->k_heads));
}

static void fill_keys(struct head_block *at) {
    const fc_gated_delta_args *a = at->heads->args;
    const struct fc_kernels *kernels = at->heads->k;
    const struct fc_head_scan *s = &at->scan;
    kernels->head_rows[a->type](at->keys, s->token, s->line, k_of(at), a->k_stride[1], s->tokens, a->n, NULL, 1.0f);
    for (ptrdiff_t r = 0; r < s->queries; r++) {
        const ptrdiff_t head = a->q_heads > a->heads ? at->h * s->queries + r : at->h / (a->heads / a->q_heads);
        const char *q = token_of(a->q, a->q_stride, at, head);
        kernels->head_rows[a->type](at->keys + (1 + r) * s->kind, s->token, s->line, q, a->q_stride[1], s->tokens, a->n,
                                    NULL, a->scale);
    }
}

static void fill_decays(struct head_block *at) {
    const fc_gated_delta_args *a = at->heads->args;
    const struct fc_kernels *kernels = at->heads->k;
    const struct fc_head_scan *s = &at->scan;
    float *decay = at->steps, *decays = at->keys + (1 + s->queries) * s->kind;
    if (a->each_n) {
        kernels->head_rows[a->g_type](decays, s->token, s->line, token_of(a->g, a->g_stride, at, at->h), a->g_stride[1],
                                      s->tokens, a->n, NULL, 1.0f);
        kernels->key_decays(s, at->keys);
        return;
    }
    if (a->g) {
        kernels->scalars_f32[a->g_type](decay, token_of(a->g, a->g_stride, at, at->h), a->g_stride[1], s->tokens);
        kernels->exp_f32(decay, s->tokens);
    } else {
        for (ptrdiff_t t = 0; t < s->tokens; t++) decay[t] = 1.0f;
    }
    if (a->beta) /* k times its decay is what the delta rule asks S before it decays */
        kernels->head_rows[a->type](decays, s->token, s->line, k_of(at), a->k_stride[1], s->tokens, a->n, decay, 1.0f);
}

static void fill(struct head_block *at) {
    const fc_gated_delta_args *a = at->heads->args;
    const struct fc_kernels *kernels = at->heads->k;
    const struct fc_head_scan *s = &at->scan;
    fill_decays(at);
    if (a->beta)
        kernels->scalars_f32[a->beta_type](at->steps + FC_HEAD_TOKENS, token_of(a->beta, a->beta_stride, at, at->h),
                                           a->beta_stride[1], s->tokens);
    kernels->head_rows[a->type](at->u, s->width, FC_PANEL,
                                token_of(a->v, a->v_stride, at, at->h) + at->p0 * fc_size_of(a->type), a->v_stride[1],
                                s->tokens, s->p, NULL, 1.0f);
}

static void put(const struct head_block *at) {
    const fc_gated_delta_args *a = at->heads->args;
    for (ptrdiff_t r = 0; r < at->scan.queries; r++) {
        const struct fc_head_output o = {
            .out = (char *)(uintptr_t)token_of(a->out, a->out_stride, at, at->h * at->scan.queries + r) +
                   at->p0 * fc_size_of(a->type),
            .y = at->scan.y + r * at->scan.tokens * at->scan.width,
            .ldo = a->out_stride[1],
            .width = at->scan.width,
        };
        at->heads->k->head_output[a->type](&o, at->scan.tokens, at->scan.p);
    }
}

fc_status fc_gated_delta(const fc_gated_delta_args *a) {
    if (!FC_IS_OURS(a)) return FC_BAD_SIZE;
    const ptrdiff_t queries = a->q_heads > a->heads && a->heads ? a->q_heads / a->heads : 1;
    struct heads heads = {
        .k = fc_k,
        .args = a,
        .batch = a->batch,
        .heads = a->heads,
        .seq = a->seq,
        .n = a->n,
        .p = a->p,
        .queries = queries,
        .kinds = 1 + queries + a->each_n + (a->beta != NULL),
        .state = a->state,
        .new_state = a->new_state,
        .state_stride = a->state_stride,
        .new_state_stride = a->new_state_stride,
        .delta = a->beta != NULL,
        .each_n = a->each_n,
        .share = a->k_heads == a->q_heads && a->heads >= a->k_heads && a->k_heads ? a->heads / a->k_heads : 1,
        .fill_keys = fill_keys,
        .fill = fill,
        .put = put,
    };
    return fc_heads_run(&heads, a->workspace);
}
