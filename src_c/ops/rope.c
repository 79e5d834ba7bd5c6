/* Rotary embedding: one item is one position of one sequence, all its heads. */
#include "rows.h"

enum { PREFETCH_BYTES = 4096 }; /* of x, fetched early */

struct rope {
    const struct fc_kernels *k;
    const fc_rope_args *a;
    ptrdiff_t head_bytes;
    fc_scratch stage; /* a thread: a head on its way past the caches */
};

static void rotate_tokens(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct rope *t = ctx;
    const fc_rope_args *a = t->a;
    void (*rotate)(void *, const void *, const float *, const float *, ptrdiff_t, ptrdiff_t) =
        a->interleaved ? t->k->rope_interleaved[a->type] : t->k->rope_split_halves[a->type];
    struct fc_stream stream = {0};
    char *stage = t->stage.block ? fc_scratch_of(&t->stage, rank) : NULL;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t b = i / a->seq, s = i % a->seq;
        const int64_t p = a->positions ? a->positions[b * a->positions_stride + s] : a->start_pos + s;
        const char *x = (const char *)a->x + b * a->x_stride[0] + s * a->x_stride[1];
        char *out = (char *)a->out + b * a->out_stride[0] + s * a->out_stride[1];
        for (ptrdiff_t h = 0; h < a->heads; h++, x += a->x_stride[2], out += a->out_stride[2]) {
            rotate(stage ? stage : out, x, a->cos + p * a->rotary_pairs, a->sin + p * a->rotary_pairs, a->rotary_pairs,
                   a->head_dim);
            if (stage) t->k->stream_row(&stream, out, stage, t->head_bytes, x + PREFETCH_BYTES);
        }
    }
    if (stage) t->k->stream_end(&stream);
}

fc_status fc_rope(const fc_rope_args *a) {
    if (!FC_IS_OURS(a)) return FC_BAD_SIZE;
    struct rope t = {.k = fc_k, .a = a, .head_bytes = a->head_dim * fc_size_of(a->type)};
    const ptrdiff_t items = a->batch * a->seq;
    const double ns = (double)(a->heads * a->head_dim) * fc_ns.rope + fc_ns.rope_token;
    const int threads = fc_threads_for(items, ns);
    if (fc_should_stream((double)(items * a->heads) * (double)t.head_bytes, a->out == a->x) &&
        fc_scratch_alloc(NULL, &t.stage, threads, (size_t)t.head_bytes))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns, rotate_tokens, &t);
    fc_scratch_free(&t.stage);
    return status;
}
