/* FC_SHORT_CONV: one product for b, c and x; the convolution of b x, times c; the output projection. */
#include "recurrent.h"

fc_status short_conv_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                          const float *residual) {
    const fc_short_conv_weights *w = part->weights;
    const ptrdiff_t n = w->channels, row = 3 * n;
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)float_bytes(p->rows, row + n))) return FC_NO_MEMORY;
    float *bcx = (float *)(void *)scratch.base; /* (M, 3 n) */
    float *y = bcx + p->rows * row;             /* (M, n) */
    fc_status status = project(p, bcx, row, x, p->rows, p->hidden, &w->in, p->hidden, row, &part->norm, NULL);
    if (status == FC_OK) status = multiply(p, bcx + 2 * n, row, bcx, row, n);
    if (status == FC_OK) status = convolve(p, state, y, bcx + 2 * n, row * 4, &w->conv, n, 0);
    if (status == FC_OK) status = relay(state, 1);
    if (status == FC_OK) status = multiply(p, y, n, bcx + n, row, n);
    if (status == FC_OK) status = project_out(p, part, out, y, n, &w->out, n, residual);
    fc_scratch_free(&scratch);
    return status;
}
