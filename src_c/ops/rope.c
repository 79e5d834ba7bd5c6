/* Rotary embedding: one item is one position of one sequence, all its heads. */
#include "rows.h"

enum { PREFETCH_BYTES = 4096 }; /* of x, fetched early */

struct rope {
    const struct fc_kernels *k;
    const fc_rope_args *args;
    ptrdiff_t head_bytes;
    fc_scratch stage; /* a thread: a head on its way past the caches */
};

static void rotate_tokens(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct rope *ctx = context;
    const fc_rope_args *args = ctx->args;
    void (*rotate)(void *, const void *, const float *, const float *, ptrdiff_t, ptrdiff_t) =
        args->interleaved ? ctx->k->rope_interleaved[args->type] : ctx->k->rope_split_halves[args->type];
    struct fc_stream stream = {0};
    char *stage = ctx->stage.block ? fc_scratch_of(&ctx->stage, rank) : NULL;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t b = i / args->seq, s = i % args->seq;
        const int64_t p = args->positions ? args->positions[b * args->positions_stride + s] : args->start_pos + s;
        const char *x = (const char *)args->x + b * args->x_stride[0] + s * args->x_stride[1];
        char *out = (char *)args->out + b * args->out_stride[0] + s * args->out_stride[1];
        for (ptrdiff_t h = 0; h < args->heads; h++, x += args->x_stride[2], out += args->out_stride[2]) {
            rotate(stage ? stage : out, x, args->cos + p * args->rotary_pairs, args->sin + p * args->rotary_pairs,
                   args->rotary_pairs, args->head_dim);
            if (stage) ctx->k->stream_row(&stream, out, stage, ctx->head_bytes, x + PREFETCH_BYTES);
        }
    }
    if (stage) ctx->k->stream_end(&stream);
}

fc_status fc_rope(const fc_rope_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    struct rope ctx = {.k = fc_k, .args = args, .head_bytes = args->head_dim * fc_size_of(args->type)};
    const ptrdiff_t items = args->batch * args->seq;
    const double ns = (double)(args->heads * args->head_dim) * fc_ns.rope + fc_ns.rope_token;
    const int threads = fc_threads_for(items, ns);
    if (fc_should_stream((double)(items * args->heads) * (double)ctx.head_bytes, args->out == args->x) &&
        fc_scratch_alloc(NULL, &ctx.stage, threads, (size_t)ctx.head_bytes))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns, rotate_tokens, &ctx);
    fc_scratch_free(&ctx.stage);
    return status;
}
