/* RMSNorm, LayerNorm and their fused residual forms over rows. */
#include "rows.h"

struct norm {
    const struct fc_kernels *k;
    fc_dtype type;
    int centred; /* LayerNorm */
    char *out, *h;
    const char *x, *residual;
    const float *weight, *bias;
    const fc_rows *rows;
    ptrdiff_t n;
    float eps, offset;
    ptrdiff_t row_bytes;
    int streamed, beyond_l2;
    fc_scratch sums; /* a thread: a row of h on its way past the caches */
};

static void norm_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct norm *ctx = context;
    struct fc_stream stream[2] = {{0}}, *out_stream = ctx->streamed ? stream : NULL;
    fc_cursor c;
    fc_cursor_at(&c, ctx->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c)) {
        const char *x = ctx->x + c.at[2], *residual = ctx->residual ? ctx->residual + c.at[3] : NULL;
        const int more = ctx->beyond_l2 && i + 1 < end;
        const char *next = more ? x + ctx->row_bytes : NULL;
        char *out = ctx->out + c.at[0], *h = ctx->h ? ctx->h + c.at[1] : NULL;
        char *stage = ctx->sums.block ? fc_scratch_of(&ctx->sums, rank) : h;
        if (ctx->centred)
            ctx->k->layer_norm[ctx->type](out, stage, x, residual, ctx->weight, ctx->bias, ctx->n, ctx->eps, next,
                                          out_stream);
        else
            ctx->k->rms_norm[ctx->type](out, stage, x, residual, ctx->weight, ctx->n, ctx->eps, ctx->offset, next,
                                        out_stream);
        if (stage != h)
            ctx->k->stream_row(stream + 1, h, stage, ctx->row_bytes, more ? residual + ctx->row_bytes : NULL);
    }
    if (ctx->streamed) ctx->k->stream_end(stream);
    if (ctx->sums.block) ctx->k->stream_end(stream + 1);
}

static fc_status norm_on_threads(struct norm *ctx, double ns_each) {
    if (!FC_IS_OURS(ctx->rows)) return FC_BAD_SIZE;
    const ptrdiff_t count = fc_rows_count(ctx->rows);
    const double ns = (double)ctx->n * ns_each + fc_ns.row;
    const int threads = fc_threads_for(count, ns);
    ctx->row_bytes = ctx->n * fc_size_of(ctx->type);
    ctx->beyond_l2 = fc_reads_beyond_l2((double)count * (double)ctx->row_bytes);
    ctx->streamed =
        fc_should_stream((double)count * (double)ctx->row_bytes, ctx->out == ctx->x || ctx->out == ctx->residual);
    if (ctx->streamed && ctx->residual && ctx->h != ctx->x && ctx->h != ctx->residual &&
        fc_scratch_alloc(NULL, &ctx->sums, threads, (size_t)ctx->row_bytes))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, count, ns, norm_rows, ctx);
    fc_scratch_free(&ctx->sums);
    return status;
}

fc_status fc_rms_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                      const fc_rows *rows, ptrdiff_t n, float eps, float offset) {
    struct norm ctx = {.k = fc_k, .type = type, .out = out, .h = h, .x = x, .residual = residual, .weight = weight,
                       .rows = rows, .n = n, .eps = eps, .offset = offset};
    return norm_on_threads(&ctx, residual ? fc_ns.norm_residual : fc_ns.rms_norm);
}

fc_status fc_layer_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                        const float *bias, const fc_rows *rows, ptrdiff_t n, float eps) {
    struct norm ctx = {.k = fc_k, .type = type, .centred = 1, .out = out, .h = h, .x = x, .residual = residual,
                       .weight = weight, .bias = bias, .rows = rows, .n = n, .eps = eps};
    return norm_on_threads(&ctx, residual ? fc_ns.norm_residual : fc_ns.layer_norm);
}
