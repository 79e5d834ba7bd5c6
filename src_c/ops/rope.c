/* Rotary embedding: one item is one position of one sequence, all its heads. */
#include "rows.h"

static void body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const fc_rope_args *a = ctx;
    void (*turn)(void *, const void *, const float *, const float *, ptrdiff_t, ptrdiff_t) =
        a->interleaved ? fc_k->rope_interleaved[a->type] : fc_k->rope_half[a->type];
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        ptrdiff_t b = i / a->seq, s = i % a->seq;
        int64_t p = a->positions ? a->positions[b * a->positions_stride + s] : a->start_pos + s;
        const char *x = (const char *)a->x + b * a->x_stride[0] + s * a->x_stride[1];
        char *out = (char *)a->out + b * a->out_stride[0] + s * a->out_stride[1];
        for (ptrdiff_t h = 0; h < a->heads; h++, x += a->x_stride[2], out += a->out_stride[2])
            turn(out, x, a->cos + p * a->half, a->sin + p * a->half, a->half, a->head_dim);
    }
}

fc_status fc_rope(const fc_rope_args *args) {
    fc_rope_args a = *args;
    ptrdiff_t items = a.batch * a.seq;
    double ns = (double)(a.heads * a.head_dim) * 0.2 + 10;
    return fc_static(fc_threads_for(items, ns), items, ns, body, &a);
}
