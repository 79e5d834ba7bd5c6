/* Rotary embedding: one item is one position of one sequence, all its heads. */
#include "rows.h"

/* Of x, fetched early; heads on their way past the caches, at most and those that go on together */
enum { PREFETCH_BYTES = 4096, STAGED = 16, TOGETHER = 2 };

struct rope {
    const struct fc_kernels *k;
    const fc_rope_args *args;
    ptrdiff_t head_bytes;
    fc_scratch stage; /* a thread: (STAGED, head_dim), or none: results are stored in the ordinary way */
};

struct staged {
    const struct rope *ctx;
    char *heads;       /* (STAGED, head_dim) */
    char *out[STAGED]; /* where they go */
    ptrdiff_t begin, end;
    struct fc_stream stream;
};

/* The place of the next head, whose result goes to `out` */
static char *stage_head(struct staged *s, char *out) {
    const ptrdiff_t slot = s->end++ % s->ctx->k->staged_heads;
    s->out[slot] = out;
    return s->heads + slot * s->ctx->head_bytes;
}

/* All heads but the last `rest` go on; those that are neighbours in out and in the stage as one row. next: what is read
 * soon, or NULL. */
static void stream_heads(struct staged *s, ptrdiff_t rest, const char *next) {
    const ptrdiff_t bytes = s->ctx->head_bytes, end = s->end - rest, slots = s->ctx->k->staged_heads;
    for (ptrdiff_t count; s->begin < end; s->begin += count) {
        const ptrdiff_t slot = s->begin % slots, most = fc_smaller(end - s->begin, slots - slot);
        char **out = s->out + slot;
        for (count = 1; count < most && out[count] == out[0] + count * bytes;) count++;
        s->ctx->k->stream_row(&s->stream, *out, s->heads + slot * bytes, count * bytes, next);
    }
}

static void rotate_tokens(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct rope *ctx = context;
    const fc_rope_args *args = ctx->args;
    void (*rotate)(void *, const void *, const float *, const float *, ptrdiff_t, ptrdiff_t) =
        args->interleaved ? ctx->k->rope_interleaved[args->type] : ctx->k->rope_split_halves[args->type];
    struct staged staged = {.ctx = ctx, .heads = ctx->stage.block ? fc_scratch_of(&ctx->stage, rank) : NULL};
    const ptrdiff_t full = staged.heads ? ctx->k->staged_heads : 0, rest = full > TOGETHER ? full - TOGETHER : 0;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t b = i / args->seq, s = i % args->seq;
        const int64_t p = args->positions ? args->positions[b * args->positions_stride + s] : args->start_pos + s;
        const char *x = (const char *)args->x + b * args->x_stride[0] + s * args->x_stride[1];
        char *out = (char *)args->out + b * args->out_stride[0] + s * args->out_stride[1];
        for (ptrdiff_t h = 0; h < args->heads; h++, x += args->x_stride[2], out += args->out_stride[2]) {
            char *to = full > 1 ? stage_head(&staged, out) : full ? staged.heads : out;
            rotate(to, x, args->cos + p * args->rotary_pairs, args->sin + p * args->rotary_pairs, args->rotary_pairs,
                   args->head_dim);
            if (full == 1) ctx->k->stream_row(&staged.stream, out, to, ctx->head_bytes, x + PREFETCH_BYTES);
            else if (full && staged.end - staged.begin == full) stream_heads(&staged, rest, x + PREFETCH_BYTES);
        }
    }
    stream_heads(&staged, 0, NULL);
    if (staged.heads) ctx->k->stream_end(&staged.stream);
}

fc_status fc_rope(const fc_rope_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    struct rope ctx = {.k = fc_k, .args = args, .head_bytes = args->head_dim * fc_size_of(args->type)};
    const ptrdiff_t items = args->batch * args->seq;
    const double ns = (double)(args->heads * args->head_dim) * fc_ns.rope + fc_ns.rope_token;
    const int threads = fc_threads_for(items, ns);
    if (fc_should_stream((double)(items * args->heads) * (double)ctx.head_bytes, args->out == args->x) &&
        fc_scratch_alloc(NULL, &ctx.stage, threads, (size_t)(STAGED * ctx.head_bytes)))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns, rotate_tokens, &ctx);
    fc_scratch_free(&ctx.stage);
    return status;
}
