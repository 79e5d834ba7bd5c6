/* LayerNorm and its fused residual form over rows. */
#include "rows.h"

struct layer_norm {
    fc_dtype type;
    char *out, *h;
    const char *x, *residual;
    const float *weight, *bias;
    const fc_rows *rows;
    ptrdiff_t n;
    float eps;
    int past;
};

static void body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct layer_norm *a = ctx;
    fc_cursor c;
    (void)rank;
    fc_cursor_at(&c, a->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c))
        fc_k->layer_norm[a->type](a->out + c.at[0], a->h ? a->h + c.at[1] : NULL, a->x + c.at[2],
                              a->residual ? a->residual + c.at[3] : NULL, a->weight, a->bias, a->n, a->eps, a->past);
}

fc_status fc_layer_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                        const float *bias, const fc_rows *rows, ptrdiff_t n, float eps) {
    struct layer_norm a = {type, out, h, x, residual, weight, bias, rows, n, eps, 0};
    const ptrdiff_t count = fc_rows_count(rows);
    const double ns = (double)n * (residual ? 0.3 : 0.2) + 20;
    a.past = fc_past_cache((double)count * (double)(n * fc_size_of(type)), out == x || out == residual);
    return fc_static(fc_threads_for(count, ns), count, ns, body, &a);
}
