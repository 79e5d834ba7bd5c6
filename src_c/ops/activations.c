/* Elementwise activations and gated products. A row may be the whole array: it is cut into blocks. */
#include "rows.h"

enum { BLOCK = 4096 };

struct elementwise {
    const struct fc_kernels *k;
    void (*unary)(void *out, const void *x, ptrdiff_t n, struct fc_stream *stream);
    void (*binary)(void *out, const void *gate, const void *up, ptrdiff_t n, struct fc_stream *stream);
    char *out;
    const char *a, *b;
    const fc_rows *rows;
    ptrdiff_t n, blocks;
    ptrdiff_t size;
    int streamed;
};

static void activate_blocks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct elementwise *ctx = context;
    struct fc_stream large = {0}, *stream = ctx->streamed ? &large : NULL;
    fc_cursor c;
    (void)rank;
    fc_cursor_at(&c, ctx->rows, begin / ctx->blocks);
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t from = i % ctx->blocks * BLOCK, n = fc_smaller(BLOCK, ctx->n - from), skip = from * ctx->size;
        char *out = ctx->out + c.at[0] + skip;
        const char *a = ctx->a + c.at[1] + skip;
        if (ctx->unary) ctx->unary(out, a, n, stream);
        else ctx->binary(out, a, ctx->b + c.at[2] + skip, n, stream);
        if (from + n == ctx->n) fc_cursor_next(&c);
    }
    if (stream) ctx->k->stream_end(stream);
}

static fc_status activate_on_threads(struct elementwise *ctx, fc_dtype type, double ns_each) {
    if (!FC_IS_OURS(ctx->rows)) return FC_BAD_SIZE;
    const ptrdiff_t count = fc_rows_count(ctx->rows), items = count * ctx->blocks;
    const double ns = ns_each * (double)(ctx->n < BLOCK ? ctx->n : BLOCK);
    ctx->size = fc_size_of(type);
    ctx->streamed =
        fc_should_stream((double)count * (double)(ctx->n * ctx->size), ctx->out == ctx->a || ctx->out == ctx->b);
    return fc_static(fc_threads_for(items, ns), items, ns, activate_blocks, ctx);
}

fc_status fc_activate(fc_activation f, fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n) {
    const struct fc_kernels *k = fc_k;
    void (*const leaf[FC_ACTIVATIONS])(void *, const void *, ptrdiff_t, struct fc_stream *) = {
        [FC_RELU] = k->relu[type],
        [FC_SILU] = k->silu[type],
        [FC_GELU] = k->gelu[type],
        [FC_GELU_TANH] = k->gelu_tanh[type],
    };
    struct elementwise ctx = {.k = k, .unary = leaf[f], .out = out, .a = x, .rows = rows, .n = n,
                              .blocks = (n + BLOCK - 1) / BLOCK};
    return activate_on_threads(&ctx, type, fc_ns.activation[f]);
}

fc_status fc_glu(fc_activation f, fc_dtype type, void *out, const void *gate, const void *up, const fc_rows *rows,
                 ptrdiff_t n) {
    const struct fc_kernels *k = fc_k;
    void (*const leaf[FC_ACTIVATIONS])(void *, const void *, const void *, ptrdiff_t, struct fc_stream *) = {
        [FC_RELU] = k->reglu[type],
        [FC_SILU] = k->swiglu[type],
        [FC_GELU] = k->geglu[type],
        [FC_GELU_TANH] = k->geglu_tanh[type],
    };
    struct elementwise ctx = {.k = k, .binary = leaf[f], .out = out, .a = gate, .b = up, .rows = rows, .n = n,
                              .blocks = (n + BLOCK - 1) / BLOCK};
    return activate_on_threads(&ctx, type, fc_ns.activation[f]);
}
