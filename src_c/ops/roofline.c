/* Known amounts of work on every thread, for fc.roofline() to put a clock on. */
#include <string.h>

#include "../formats.h"
#include "rows.h"

enum { LONG_NS = 1000000, PIECE = 1 << 20 };

struct peak {
    void (*leaf)(float *, ptrdiff_t);
    ptrdiff_t iterations;
};

static void run_peak(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct peak *ctx = context;
    (void)rank;
    for (; begin < end; begin++) {
        float sink[4] = {0.999f, 0.001f, 0.5f, 0.0f};
        ctx->leaf(sink, ctx->iterations);
    }
}

double fc_peak_ops(fc_peak what, ptrdiff_t iterations) {
    const struct fc_kernels *k = fc_k;
    void (*const leaf[])(float *, ptrdiff_t) = {k->peak_f32, k->peak_bf16, k->peak_i8, k->peak_i4};
    const double ops[] = {k->ops_f32, k->ops_bf16, k->ops_i8, k->ops_i4};
    struct peak p = {leaf[what], iterations};
    int threads = fc_get_num_threads();
    if (ops[what] > 0) fc_static(threads, threads, LONG_NS, run_peak, &p);
    return ops[what] * (double)iterations * threads;
}

struct stream {
    const struct fc_kernels *k;
    char *out;
    const char *in;
    ptrdiff_t bytes;
    float *sums;
};

static void read_piece(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct stream *ctx = context;
    for (float part; begin < end; begin++) {
        ptrdiff_t at = begin * PIECE, n = ctx->bytes - at < PIECE ? ctx->bytes - at : PIECE;
        ctx->k->read_sum(&part, (const float *)(const void *)(ctx->in + at), n / 4);
        ctx->sums[rank * 16] += part;
    }
}

fc_status fc_read_bytes(const void *data, ptrdiff_t bytes, float *sum) {
    int threads = fc_get_num_threads();
    fc_scratch scratch;
    if (fc_scratch_alloc(NULL, &scratch, 1, (size_t)threads * FC_LINE)) return FC_NO_MEMORY;
    struct stream s = {.k = fc_k, .in = data, .bytes = bytes, .sums = (float *)scratch.base};
    memset(s.sums, 0, (size_t)threads * FC_LINE);
    fc_status status = fc_static(threads, (bytes + PIECE - 1) / PIECE, LONG_NS / 10, read_piece, &s);
    *sum = 0;
    for (int i = 0; i < threads; i++) *sum += s.sums[i * 16];
    fc_scratch_free(&scratch);
    return status;
}

static void copy_piece(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct stream *ctx = context;
    ptrdiff_t from = begin * PIECE, to = end * PIECE < ctx->bytes ? end * PIECE : ctx->bytes;
    (void)rank;
    ctx->k->copy_stream((float *)(void *)(ctx->out + from), (const float *)(const void *)(ctx->in + from),
                        (to - from) / 4);
    memcpy(ctx->out + to - (to - from) % 4, ctx->in + to - (to - from) % 4, (size_t)((to - from) % 4));
}

fc_status fc_copy_bytes(void *out, const void *data, ptrdiff_t bytes) {
    struct stream s = {.k = fc_k, .out = out, .in = data, .bytes = bytes};
    return fc_static(fc_get_num_threads(), (bytes + PIECE - 1) / PIECE, LONG_NS / 10, copy_piece, &s);
}
