/* FC_MAMBA: one product for x and z; the convolution; what a token does to the state, by two products of x; the scan,
 * which ends with the gate; the output projection. */
#include "recurrent.h"

struct mamba_pass {
    const struct pass *p;
    const fc_mamba_weights *w;
    const fc_recurrent_state *s;
    float *xz;    /* (M, 2 inner) */
    float *u;     /* (M, inner): x after the convolution, then what the scan gives */
    float *dbc;   /* (M, rank + 2 n): dt before its own product, B, C */
    float *delta; /* (M, inner) */
    ptrdiff_t dbc_row; /* floats */
};

/* dt, B and C through norms of their own, where there are some */
static fc_status norm_inputs(const struct mamba_pass *t) {
    const fc_mamba_weights *w = t->w;
    const fc_norm *norms[3] = {&w->dt_norm, &w->b_norm, &w->c_norm};
    const ptrdiff_t sizes[3] = {w->rank, w->n, w->n};
    float *at = t->dbc;
    fc_status status = FC_OK;
    for (int i = 0; i < 3 && status == FC_OK; at += sizes[i++])
        if (norms[i]->kind != FC_NO_NORM)
            status = normalise(at, at, norms[i], t->p->rows, t->dbc_row, 1, sizes[i]);
    return status;
}

static fc_status scan_rows(const struct mamba_pass *t, const struct rows_state *r) {
    const fc_mamba_weights *w = t->w;
    const ptrdiff_t seq = t->p->seq, first = r->row * seq, row = w->inner * 4, dbc_row = t->dbc_row * 4;
    const ptrdiff_t state = (w->conv.width - 1) * w->inner; /* floats of a slot before h */
    const float *b = t->dbc + first * t->dbc_row + w->rank;
    float *u = t->u + first * w->inner;
    return fc_selective_scan(&(fc_scan_args){
        .size = sizeof(fc_scan_args), .type = FC_F32, .out = u, .u = u, .delta = t->delta + first * w->inner,
        .z = t->xz + (2 * first + 1) * w->inner, .new_state = r->to + state, .state = r->from ? r->from + state : NULL,
        .a = w->a, .b = b, .c = b + w->n, .d = w->d, .delta_bias = w->dt_bias, .delta_softplus = 1, .batch = r->batch,
        .seq = seq, .channels = w->inner, .n = w->n, .lda = w->n * 4, .out_stride = {seq * row, row},
        .u_stride = {seq * row, row}, .delta_stride = {seq * row, row}, .z_stride = {2 * seq * row, 2 * row},
        .b_stride = {seq * dbc_row, dbc_row}, .c_stride = {seq * dbc_row, dbc_row},
        .new_state_stride = {r->apart, w->n * 4}, .state_stride = {r->apart, w->n * 4},
        .workspace = t->p->workspace});
}

static fc_status scan(const struct mamba_pass *t) {
    const ptrdiff_t calls = state_calls(t->s, t->p->batch);
    fc_status status = FC_OK;
    for (ptrdiff_t i = 0; i < calls && status == FC_OK; i++) {
        const struct rows_state r = state_of_call(t->s, t->p->batch, calls, i);
        status = scan_rows(t, &r);
    }
    return status == FC_OK ? relay(t->s, 1) : status;
}

/* dt, B and C of the channels u of all ranks, which each computes; or of this one's, as terms of a sum */
static fc_status project_u(const struct mamba_pass *t, const fc_part *part) {
    const struct pass *p = t->p;
    const float *u = t->u;
    ptrdiff_t n = t->w->inner;
    fc_scratch wide = {0};
    fc_status status = FC_OK;
    if (part->inner) {
        status = widen(p, part->inner, &wide, u, n);
        u = (const float *)(const void *)wide.base, n = part->inner->n;
    }
    if (status == FC_OK) status = project(p, t->dbc, t->dbc_row, u, p->rows, n, &t->w->x, n, t->dbc_row, NULL, NULL);
    if (status == FC_OK && !part->inner) status = exchange(part->ranks, t->dbc, p->rows, t->dbc_row);
    fc_scratch_free(&wide);
    return status;
}

fc_status mamba_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                     const float *residual) {
    const fc_mamba_weights *w = part->weights;
    const ptrdiff_t inner = w->inner, dbc = w->rank + 2 * w->n;
    struct mamba_pass t = {.p = p, .w = w, .s = state, .dbc_row = dbc};
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)float_bytes(p->rows, 4 * inner + dbc))) return FC_NO_MEMORY;
    t.xz = (float *)(void *)scratch.base;
    t.u = t.xz + p->rows * 2 * inner;
    t.delta = t.u + p->rows * inner;
    t.dbc = t.delta + p->rows * inner;
    fc_status status =
        project(p, t.xz, 2 * inner, x, p->rows, p->hidden, &w->in, p->hidden, 2 * inner, &part->norm, NULL);
    if (status == FC_OK) status = convolve(p, t.s, t.u, t.xz, 2 * inner * 4, &w->conv, inner, 1);
    if (status == FC_OK) status = project_u(&t, part);
    if (status == FC_OK) status = norm_inputs(&t);
    if (status == FC_OK) status = project(p, t.delta, inner, t.dbc, p->rows, dbc, &w->dt, w->rank, inner, NULL, NULL);
    if (status == FC_OK) status = scan(&t);
    if (status == FC_OK) status = project_out(p, part, out, t.u, inner, &w->out, inner, residual);
    fc_scratch_free(&scratch);
    return status;
}
