/* Mamba-2's state-space scan, in time order: see heads.h. */
#include "heads.h"

static const char *token_of(const void *x, const ptrdiff_t *stride, const struct head_block *at, ptrdiff_t head) {
    return (const char *)x + at->b * stride[0] + at->start * stride[1] + head * stride[2];
}

static void fill_keys(struct head_block *at) {
    const struct fc_kernels *k = at->heads->k;
    const fc_ssd_scan_args *a = at->heads->args;
    const struct fc_head_scan *s = &at->scan;
    const ptrdiff_t group = at->h / (a->heads / a->groups);
    k->head_rows[a->type](at->keys, s->token, s->line, token_of(a->b, a->b_stride, at, group), a->b_stride[1],
                          s->tokens, a->n, NULL, 1.0f);
    k->head_rows[a->type](at->keys + s->kind, s->token, s->line, token_of(a->c, a->c_stride, at, group), a->c_stride[1],
                          s->tokens, a->n, NULL, 1.0f);
}

static void fill(struct head_block *at) {
    const struct fc_kernels *k = at->heads->k;
    const fc_ssd_scan_args *a = at->heads->args;
    const struct fc_head_scan *s = &at->scan;
    float *decay = at->steps, *dt = at->steps + 2 * FC_HEAD_TOKENS;
    const struct fc_ssd_steps steps = {
        .a = fc_get_float(a->a, at->h),
        .bias = a->dt_bias ? fc_get_float(a->dt_bias, at->h) : 0.0f,
        .lo = a->dt_min,
        .hi = a->dt_max,
        .softplus = a->dt_softplus,
    };
    k->scalars_f32[a->dt_type](dt, token_of(a->dt, a->dt_stride, at, at->h), a->dt_stride[1], s->tokens);
    k->ssd_steps(dt, decay, s->tokens, &steps);
    const char *x = token_of(a->x, a->x_stride, at, at->h) + at->p0 * fc_size_of(a->type);
    k->head_rows[a->type](at->u, s->width, FC_PANEL, x, a->x_stride[1], s->tokens, s->p, dt, 1.0f);
}

static void put(const struct head_block *at) {
    const fc_ssd_scan_args *a = at->heads->args;
    const ptrdiff_t skipped = at->p0 * fc_size_of(a->type);
    const struct fc_head_output o = {
        .out = (char *)(uintptr_t)token_of(a->out, a->out_stride, at, at->h) + skipped,
        .y = at->scan.y,
        .x = a->d ? token_of(a->x, a->x_stride, at, at->h) + skipped : NULL,
        .z = a->z ? token_of(a->z, a->z_stride, at, at->h) + skipped : NULL,
        .ldo = a->out_stride[1],
        .width = at->scan.width,
        .ldx = a->x_stride[1],
        .ldz = a->z_stride[1],
        .d = a->d ? fc_get_float(a->d, at->h) : 0.0f,
    };
    at->heads->k->head_output[a->type](&o, at->scan.tokens, at->scan.p);
}

fc_status fc_ssd_scan(const fc_ssd_scan_args *a) {
    if (!FC_IS_OURS(a)) return FC_BAD_SIZE;
    struct heads heads = {
        .k = fc_k,
        .args = a,
        .batch = a->batch,
        .heads = a->heads,
        .seq = a->seq,
        .n = a->n,
        .p = a->p,
        .queries = 1,
        .kinds = 2,
        .state = a->state,
        .new_state = a->new_state,
        .state_stride = a->state_stride,
        .new_state_stride = a->new_state_stride,
        .by_p = !a->state_by_n,
        .share = a->groups ? a->heads / a->groups : 1,
        .fill_keys = fill_keys,
        .fill = fill,
        .put = put,
    };
    return fc_heads_run(&heads, a->workspace);
}
