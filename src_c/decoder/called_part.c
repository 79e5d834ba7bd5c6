/* FC_CALLED: a part that the caller computes, for kinds that this library does not have. */
#include <string.h>

#include "pass.h"

fc_status called_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                      const float *residual) {
    const fc_called *called = part->weights;
    const ptrdiff_t n = p->rows * p->hidden;
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)(2 * n) * 4)) return FC_NO_MEMORY;
    float *in = (float *)(void *)scratch.base, *y = in + n; /* (M, hidden) each */
    fc_status status = FC_OK;
    if (part->norm.kind == FC_NO_NORM) memcpy(in, x, (size_t)n * 4);
    else status = normalise(in, x, &part->norm, p->rows, p->hidden, 1, p->hidden);
    if (status == FC_OK) status = called->call(called->self, state, y, in, p->batch, p->seq, p->hidden, p->start);
    if (status == FC_OK && residual) p->k->add_scaled(out, residual, y, 1.0f, n);
    else if (status == FC_OK) memcpy(out, y, (size_t)n * 4);
    fc_scratch_free(&scratch);
    return status;
}
