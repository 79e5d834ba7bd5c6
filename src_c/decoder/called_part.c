/* FC_CALLED: a part that the caller computes, for kinds that this library does not have. */
#include "pass.h"

fc_status called_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                      const float *residual) {
    const fc_called *called = part->weights;
    fc_status status = FC_OK;
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)fc_times(2, float_bytes(p->rows, p->hidden))))
        return FC_NO_MEMORY;
    float *normed = (float *)(void *)scratch.base; /* (M, hidden), and so is y */
    float *y = residual ? normed + p->rows * p->hidden : out;
    if (part->norm.kind != FC_NO_NORM) {
        status = normalise(normed, x, &part->norm, p->rows, p->hidden, 1, p->hidden);
        x = normed;
    }
    if (status == FC_OK) status = called->call(called->self, state, y, x, p->batch, p->seq, p->hidden, p->start);
    if (status == FC_OK && residual) status = add_scaled(p, out, residual, y, 1.0f);
    fc_scratch_free(&scratch);
    return status;
}
