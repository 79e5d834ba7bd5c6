/* The union of two attentions over disjoint keys, from their results and the logs of their denominators. */
#include <math.h>

#include "rows.h"

struct merge {
    const struct fc_kernels *k;
    fc_dtype type;
    char *out;
    float *lse;
    const char *a, *b;
    const float *lse_a, *lse_b;
    ptrdiff_t n, size;
};

static void merge_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct merge *ctx = context;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        /* A NaN on either side must win. */
        const float la = fc_get_float(ctx->lse_a, i), lb = fc_get_float(ctx->lse_b, i),
                    top = la > lb || la != la ? la : lb;
        float wa = 0.0f, wb = 0.0f;
        if (top != -INFINITY) wa = expf(la - top), wb = expf(lb - top);
        float total = wa + wb;
        ctx->k->merge[ctx->type](ctx->out + i * ctx->n * ctx->size, ctx->a + i * ctx->n * ctx->size,
                                 ctx->b + i * ctx->n * ctx->size, total == 0.0f ? 0.0f : wa / total,
                                 total == 0.0f ? 0.0f : wb / total, ctx->n);
        fc_put_float(ctx->lse, i, total == 0.0f ? -INFINITY : top + logf(total));
    }
}

fc_status fc_merge_attention(fc_dtype type, void *out, float *lse, const void *a, const float *lse_a, const void *b,
                             const float *lse_b, ptrdiff_t rows, ptrdiff_t n) {
    struct merge ctx = {fc_k, type, out, lse, a, b, lse_a, lse_b, n, fc_size_of(type)};
    double ns = (double)n * fc_ns.merge + fc_ns.merge_row;
    return fc_static(fc_threads_for(rows, ns), rows, ns, merge_rows, &ctx);
}
