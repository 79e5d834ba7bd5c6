/* Softmax over rows. */
#include "rows.h"

enum {
    EXPS = 32,    /* a multiple of two vectors' floats on every ISA */
    AHEAD = 2048, /* bytes beyond the next row: its last ones, asked for while this one is made, would come too late */
};

struct softmax {
    const struct fc_kernels *k;
    fc_dtype type;
    char *out;
    const char *x;
    const fc_rows *rows;
    ptrdiff_t n;
    fc_scratch exps; /* a thread: (row), where out cannot hold them, or two rows of them */
    ptrdiff_t row;   /* n, and what makes it a multiple of two vectors */
};

static void softmax_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct softmax *ctx = context;
    fc_cursor c;
    fc_cursor_at(&c, ctx->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c)) {
        char *out = ctx->out + c.at[0];
        void *e = ctx->exps.block ? fc_scratch_of(&ctx->exps, rank) : out;
        ctx->k->softmax[ctx->type](out, ctx->x + c.at[1], e, ctx->n);
    }
}

/* Two rows of exponentials in turn: one waits while the other is made. */
static void softmax_rows_streamed(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct softmax *ctx = context;
    const ptrdiff_t bytes = ctx->n * fc_size_of(ctx->type);
    float *e = (float *)(void *)fc_scratch_of(&ctx->exps, rank);
    struct fc_stream stream = {0};
    struct fc_softmax_row row = {0};
    fc_cursor c;
    fc_cursor_at(&c, ctx->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c)) {
        const char *x = ctx->x + c.at[1], *next = i + 1 < end ? x + bytes + AHEAD : NULL;
        float *turn = e + (i - begin) % 2 * ctx->row;
        ctx->k->softmax_streamed[ctx->type](&stream, &row, ctx->out + c.at[0], x, turn, ctx->n, next);
    }
    ctx->k->softmax_streamed[ctx->type](&stream, &row, NULL, NULL, NULL, ctx->n, NULL);
    ctx->k->stream_end(&stream);
}

/* Vectors of out are put together from whole values. */
static int are_aligned(const void *out, const fc_rows *rows, ptrdiff_t size) {
    ptrdiff_t all = (ptrdiff_t)(uintptr_t)out;
    for (int d = 0; d < rows->ndim; d++) all |= rows->stride[0][d];
    return all % size == 0;
}

fc_status fc_softmax(fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n) {
    if (!FC_IS_OURS(rows)) return FC_BAD_SIZE;
    struct softmax ctx = {.k = fc_k, .type = type, .out = out, .x = x, .rows = rows, .n = n,
                          .row = fc_round_up(n, EXPS)};
    const ptrdiff_t count = fc_rows_count(rows), size = fc_size_of(type);
    const double ns = (double)n * fc_ns.softmax + fc_ns.row, bytes = (double)count * (double)(n * size);
    const int threads = fc_threads_for(count, ns), streamed = fc_should_stream(bytes, out == x) &&
                                                              are_aligned(out, rows, size);
    if ((type != FC_F32 || streamed) &&
        fc_scratch_alloc(NULL, &ctx.exps, threads, (size_t)fc_times(ctx.row, streamed ? 8 : 4)))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, count, ns, streamed ? softmax_rows_streamed : softmax_rows, &ctx);
    fc_scratch_free(&ctx.exps);
    return status;
}
