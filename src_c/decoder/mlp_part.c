/* FC_GATED_MLP: down (f(x gate) * (x up)), and FC_MLP: down f(x up) or down f(x up)^2. */
#include "pass.h"

/* inner (M, inner) = f(norm(x) gate) * (norm(x) up) from two matrices; ups: as large */
static fc_status two_sides(const struct pass *p, const fc_mlp_weights *w, float *inner, float *ups, const float *x,
                           const fc_norm *norm) {
    const ptrdiff_t n = w->inner;
    const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {p->rows},
                          .stride = {{n * 4}, {n * 4}, {n * 4}, {0}}};
    fc_status status = project(p, inner, n, x, p->rows, p->hidden, &w->gate, p->hidden, n, norm, NULL);
    if (status == FC_OK) status = project(p, ups, n, x, p->rows, p->hidden, &w->up, p->hidden, n, norm, NULL);
    return status == FC_OK ? fc_glu(w->activation, FC_F32, inner, inner, ups, &each, n) : status;
}

fc_status mlp_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                   const float *residual) {
    const fc_mlp_weights *w = part->weights;
    const int apart = part->kind == FC_GATED_MLP && w->gate.data;
    fc_status status;
    fc_scratch scratch;
    (void)state;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)fc_times(apart ? 2 : 1, float_bytes(p->rows, w->inner))))
        return FC_NO_MEMORY;
    float *inner = (float *)(void *)scratch.base; /* (M, inner), twice if `apart` */
    if (apart) {
        status = two_sides(p, w, inner, inner + p->rows * w->inner, x, &part->norm);
    } else if (part->kind == FC_GATED_MLP) {
        status = project_gated(p, inner, x, &w->up, p->hidden, w->inner, &part->norm, w->activation);
    } else {
        status = project(p, inner, w->inner, x, p->rows, p->hidden, &w->up, p->hidden, w->inner, &part->norm, NULL);
        if (status == FC_OK) status = activate(inner, w->activation, p->rows, w->inner);
        if (status == FC_OK && w->squared) status = multiply(p, inner, w->inner, inner, w->inner, w->inner);
    }
    if (status == FC_OK) status = project_out(p, part, out, inner, w->inner, &w->down, w->inner, residual);
    fc_scratch_free(&scratch);
    return status;
}
