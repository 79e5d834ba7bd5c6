/* FC_MAMBA2: one product for z, x, B, C and dt; the convolution of x, B and C; the scan; the gate and a norm of the
 * channels of each group; the output projection. */
#include "recurrent.h"

struct mamba2_pass {
    const struct pass *p;
    const fc_mamba2_weights *w;
    const fc_recurrent_state *s;
    float *all; /* (M, inner + conv + heads): z, what goes into the convolution, dt */
    float *xbc; /* (M, conv): x, B, C after the convolution; x becomes what the scan gives */
    ptrdiff_t inner, conv, row; /* channels of x, of the convolution; floats of a row of `all` */
};

static fc_status scan_rows(const struct mamba2_pass *t, const struct rows_state *r, int gated) {
    const fc_mamba2_weights *w = t->w;
    const ptrdiff_t seq = t->p->seq, first = r->row * seq, row = t->row * 4, xbc = t->conv * 4;
    const ptrdiff_t head = w->head_dim * 4, group = w->n * 4, state = (w->conv.width - 1) * t->conv;
    const float *z = t->all + first * t->row;
    float *x = t->xbc + first * t->conv;
    return fc_ssd_scan(&(fc_ssd_scan_args){
        .size = sizeof(fc_ssd_scan_args), .type = FC_F32, .dt_type = FC_F32, .out = x, .x = x,
        .new_state = r->to + state, .state = r->from ? r->from + state : NULL, .dt = z + t->inner + t->conv,
        .b = x + t->inner, .c = x + t->inner + w->groups * w->n, .z = gated ? z : NULL, .a = w->a, .d = w->d,
        .dt_bias = w->dt_bias, .batch = r->batch, .seq = seq, .heads = w->heads, .groups = w->groups,
        .p = w->head_dim, .n = w->n, .out_stride = {seq * xbc, xbc, head}, .x_stride = {seq * xbc, xbc, head},
        .dt_stride = {seq * row, row, 4}, .b_stride = {seq * xbc, xbc, group}, .c_stride = {seq * xbc, xbc, group},
        .z_stride = {seq * row, row, head}, .state_stride = {r->apart, head * w->n, head},
        .new_state_stride = {r->apart, head * w->n, head}, .state_by_n = 1, .dt_min = w->dt_min, .dt_max = w->dt_max,
        .dt_softplus = 1, .workspace = t->p->workspace});
}

static fc_status scan(const struct mamba2_pass *t, int gated) {
    const ptrdiff_t calls = state_calls(t->s, t->p->batch);
    fc_status status = FC_OK;
    for (ptrdiff_t i = 0; i < calls && status == FC_OK; i++) {
        const struct rows_state r = state_of_call(t->s, t->p->batch, calls, i);
        status = scan_rows(t, &r, gated);
    }
    return status == FC_OK ? relay(t->s, 1) : status;
}

/* y of each group by itself; its weights are the group's own */
static fc_status norm_groups(const struct mamba2_pass *t) {
    const ptrdiff_t n = t->inner / t->w->groups;
    fc_status status = FC_OK;
    for (ptrdiff_t g = 0; g < t->w->groups && status == FC_OK; g++) {
        fc_norm norm = t->w->norm;
        norm.weight += g * n;
        status = normalise(t->xbc + g * n, t->xbc + g * n, &norm, t->p->rows, t->conv, 1, n);
    }
    return status;
}

/* y *= silu(z) */
static fc_status gate(const struct mamba2_pass *t) {
    const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {t->p->rows},
                          .stride = {{t->conv * 4}, {t->row * 4}, {t->conv * 4}, {0}}};
    return fc_glu(FC_SILU, FC_F32, t->xbc, t->all, t->xbc, &each, t->inner);
}

fc_status mamba2_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                      const float *residual) {
    const fc_mamba2_weights *w = part->weights;
    const ptrdiff_t inner = w->heads * w->head_dim, conv = inner + 2 * w->groups * w->n, row = inner + conv + w->heads;
    const int normed = w->norm.kind != FC_NO_NORM, gate_last = normed && w->norm_before_gate;
    struct mamba2_pass t = {.p = p, .w = w, .s = state, .inner = inner, .conv = conv, .row = row};
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)float_bytes(p->rows, row + conv))) return FC_NO_MEMORY;
    t.all = (float *)(void *)scratch.base;
    t.xbc = t.all + p->rows * row;
    fc_status status = project(p, t.all, row, x, p->rows, p->hidden, &w->in, p->hidden, row, &part->norm, NULL);
    if (status == FC_OK) status = convolve(p, t.s, t.xbc, t.all + inner, row * 4, &w->conv, conv, 1);
    if (status == FC_OK) status = scan(&t, !gate_last);
    if (status == FC_OK && normed) status = norm_groups(&t);
    if (status == FC_OK && gate_last) status = gate(&t);
    if (status == FC_OK) status = project_out(p, part, out, t.xbc, conv, &w->out, inner, residual);
    fc_scratch_free(&scratch);
    return status;
}
