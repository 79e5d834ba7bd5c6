/* From one storage type to another: parameters on their way to a kernel, table rows, tokens on their way to a cache. */
#include <string.h>

#include "rows.h"

enum { PIECE = 512 };

fc_status fc_convert(fc_dtype type, float *out, const void *x, ptrdiff_t n) {
    const struct fc_kernels *k = fc_k;
    k->to_f32[type](out, x, n, 1.0f);
    return FC_OK;
}

void fc_convert_row(const struct fc_kernels *k, fc_dtype to_type, void *to, fc_dtype from_type, const void *from,
                    ptrdiff_t n, float scale) {
    const ptrdiff_t from_size = fc_size_of(from_type), to_size = fc_size_of(to_type);
    if (to_type == from_type && scale == 1.0f) {
        memcpy(to, from, (size_t)(n * to_size));
        return;
    }
    for (ptrdiff_t i = 0; i < n; i += PIECE) {
        float wide[PIECE];
        ptrdiff_t m = n - i < PIECE ? n - i : PIECE;
        k->to_f32[from_type](wide, (const char *)from + i * from_size, m, scale);
        k->from_f32[to_type]((char *)to + i * to_size, wide, m, 1.0f);
    }
}
