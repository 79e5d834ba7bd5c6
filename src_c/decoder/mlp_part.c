/* FC_GATED_MLP: down (f(x gate) * (x up)), and FC_MLP: down f(x up). */
#include "pass.h"

fc_status mlp_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                   const float *residual) {
    const fc_mlp_weights *w = part->weights;
    fc_status status;
    fc_scratch scratch;
    (void)state;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)float_bytes(p->rows, w->inner))) return FC_NO_MEMORY;
    float *inner = (float *)(void *)scratch.base; /* (M, inner) */
    if (part->kind == FC_GATED_MLP) {
        status = project_gated(p, inner, x, &w->up, p->hidden, w->inner, &part->norm, w->activation);
    } else {
        status = project(p, inner, x, p->rows, p->hidden, &w->up, p->hidden, w->inner, &part->norm, NULL);
        if (status == FC_OK) status = activate(inner, w->activation, p->rows, w->inner);
    }
    if (status == FC_OK)
        status = project(p, out, inner, p->rows, w->inner, &w->down, w->inner, p->hidden, NULL, residual);
    fc_scratch_free(&scratch);
    return status;
}
