/* Softmax over rows. */
#include "rows.h"

struct softmax {
    const struct fc_kernels *k;
    fc_dtype type;
    char *out;
    const char *x;
    const fc_rows *rows;
    ptrdiff_t n;
    int streamed, beyond_l2;
    fc_scratch exps; /* a thread: (n), where out cannot hold them */
};

static void softmax_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct softmax *ctx = context;
    struct fc_stream stream = {0};
    fc_cursor c;
    fc_cursor_at(&c, ctx->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c)) {
        void *out = ctx->out + c.at[0];
        const char *x = ctx->x + c.at[1];
        ctx->k->softmax[ctx->type](out, x, ctx->exps.block ? fc_scratch_of(&ctx->exps, rank) : out, ctx->n,
                                   ctx->beyond_l2 && i + 1 < end ? x + ctx->n * fc_size_of(ctx->type) : NULL,
                                   ctx->streamed ? &stream : NULL);
    }
    if (ctx->streamed) ctx->k->stream_end(&stream);
}

fc_status fc_softmax(fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n) {
    if (!FC_IS_OURS(rows)) return FC_BAD_SIZE;
    struct softmax ctx = {.k = fc_k, .type = type, .out = out, .x = x, .rows = rows, .n = n};
    const ptrdiff_t count = fc_rows_count(rows);
    const double ns = (double)n * fc_ns.softmax + fc_ns.row;
    const int threads = fc_threads_for(count, ns);
    ctx.beyond_l2 = fc_reads_beyond_l2((double)count * (double)(n * fc_size_of(type)));
    ctx.streamed = fc_should_stream((double)count * (double)(n * fc_size_of(type)), out == x);
    if ((type != FC_F32 || ctx.streamed) && fc_scratch_alloc(NULL, &ctx.exps, threads, (size_t)n * 4))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, count, ns, softmax_rows, &ctx);
    fc_scratch_free(&ctx.exps);
    return status;
}
