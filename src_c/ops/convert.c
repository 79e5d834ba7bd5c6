/* Any storage type to float32: small parameters (norm weights, biases, sinks) on their way to a kernel. */
#include "rows.h"

fc_status fc_convert(fc_dtype type, float *out, const void *x, ptrdiff_t n) {
    fc_k->to_f32[type](out, x, n, 1.0f);
    return FC_OK;
}
