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

static void softmax_rows(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct softmax *a = ctx;
    struct fc_stream stream = {0};
    fc_cursor c;
    fc_cursor_at(&c, a->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c)) {
        void *out = a->out + c.at[0];
        const char *x = a->x + c.at[1];
        a->k->softmax[a->type](out, x, a->exps.block ? fc_scratch_of(&a->exps, rank) : out, a->n,
                               a->beyond_l2 && i + 1 < end ? x + a->n * fc_size_of(a->type) : NULL, a->streamed ? &stream : NULL);
    }
    if (a->streamed) a->k->stream_end(&stream);
}

fc_status fc_softmax(fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n) {
    if (!FC_IS_OURS(rows)) return FC_BAD_SIZE;
    struct softmax a = {.k = fc_k, .type = type, .out = out, .x = x, .rows = rows, .n = n};
    const ptrdiff_t count = fc_rows_count(rows);
    const double ns = (double)n * fc_ns.softmax + fc_ns.row;
    const int threads = fc_threads_for(count, ns);
    a.beyond_l2 = fc_reads_beyond_l2((double)count * (double)(n * fc_size_of(type)));
    a.streamed = fc_should_stream((double)count * (double)(n * fc_size_of(type)), out == x);
    if ((type != FC_F32 || a.streamed) && fc_scratch_alloc(NULL, &a.exps, threads, (size_t)n * 4)) return FC_NO_MEMORY;
    fc_status status = fc_static(threads, count, ns, softmax_rows, &a);
    fc_scratch_free(&a.exps);
    return status;
}
