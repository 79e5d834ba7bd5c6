/* Attentions over disjoint keys become one: two, from their results and the logs of their denominators; those of single
 * chunks, from what they carry. */
#include <math.h>
#include <string.h>

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

struct fold {
    const struct fc_kernels *k;
    float *carried;     /* (rows, E + 2): o, max, sum */
    const float *parts; /* (chunks, rows, E + 2) */
    ptrdiff_t chunks, rows, e;
};

enum { LANES = 16 }; /* the leaf takes whole vectors of any ISA */

static void fold_row(const struct fold *ctx, float *to, const float *part) {
    const ptrdiff_t e = ctx->e, whole = e / LANES * LANES;
    float max, sum, max_part, sum_part, rest[LANES] = {0}, rest_part[LANES] = {0};
    memcpy(&max, to + e, 4);
    memcpy(&sum, to + e + 1, 4);
    memcpy(&max_part, part + e, 4);
    memcpy(&sum_part, part + e + 1, 4);
    if (whole < e) {
        float same_max = max, same_sum = sum;
        memcpy(rest, to + whole, (size_t)(e - whole) * 4);
        memcpy(rest_part, part + whole, (size_t)(e - whole) * 4);
        ctx->k->attention_fold(rest, &same_max, &same_sum, rest_part, max_part, sum_part, LANES);
        memcpy(to + whole, rest, (size_t)(e - whole) * 4);
    }
    ctx->k->attention_fold(to, &max, &sum, part, max_part, sum_part, whole);
    memcpy(to + e, &max, 4);
    memcpy(to + e + 1, &sum, 4);
}

static void fold_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct fold *ctx = context;
    const ptrdiff_t row = ctx->e + 2;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++)
        for (ptrdiff_t c = 0; c < ctx->chunks; c++)
            fold_row(ctx, ctx->carried + i * row, ctx->parts + (c * ctx->rows + i) * row);
}

fc_status fc_fold_attention(float *carried, const float *parts, ptrdiff_t chunks, ptrdiff_t rows, ptrdiff_t e) {
    struct fold ctx = {fc_k, carried, parts, chunks, rows, e};
    const double ns = (double)(chunks * e) * fc_ns.fold;
    return fc_static(fc_threads_for(rows, ns), rows, ns, fold_rows, &ctx);
}
