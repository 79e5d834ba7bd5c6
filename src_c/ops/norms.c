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

static void norm_rows(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct norm *a = ctx;
    struct fc_stream stream[2] = {{0}}, *out_stream = a->streamed ? stream : NULL;
    fc_cursor c;
    fc_cursor_at(&c, a->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c)) {
        const char *x = a->x + c.at[2], *residual = a->residual ? a->residual + c.at[3] : NULL;
        const int more = a->beyond_l2 && i + 1 < end;
        const char *next = more ? x + a->row_bytes : NULL;
        char *out = a->out + c.at[0], *h = a->h ? a->h + c.at[1] : NULL;
        char *stage = a->sums.block ? fc_scratch_of(&a->sums, rank) : h;
        if (a->centred)
            a->k->layer_norm[a->type](out, stage, x, residual, a->weight, a->bias, a->n, a->eps, next, out_stream);
        else
            a->k->rms_norm[a->type](out, stage, x, residual, a->weight, a->n, a->eps, a->offset, next, out_stream);
        if (stage != h) a->k->stream_row(stream + 1, h, stage, a->row_bytes, more ? residual + a->row_bytes : NULL);
    }
    if (a->streamed) a->k->stream_end(stream);
    if (a->sums.block) a->k->stream_end(stream + 1);
}

static fc_status norm_on_threads(struct norm *a, double ns_each) {
    if (!FC_IS_OURS(a->rows)) return FC_BAD_SIZE;
    const ptrdiff_t count = fc_rows_count(a->rows);
    const double ns = (double)a->n * ns_each + fc_ns.row;
    const int threads = fc_threads_for(count, ns);
    a->row_bytes = a->n * fc_size_of(a->type);
    a->beyond_l2 = fc_reads_beyond_l2((double)count * (double)a->row_bytes);
    a->streamed = fc_should_stream((double)count * (double)a->row_bytes, a->out == a->x || a->out == a->residual);
    if (a->streamed && a->residual && a->h != a->x && a->h != a->residual &&
        fc_scratch_alloc(NULL, &a->sums, threads, (size_t)a->row_bytes))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, count, ns, norm_rows, a);
    fc_scratch_free(&a->sums);
    return status;
}

fc_status fc_rms_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                      const fc_rows *rows, ptrdiff_t n, float eps, float offset) {
    struct norm a = {.k = fc_k, .type = type, .out = out, .h = h, .x = x, .residual = residual, .weight = weight,
                     .rows = rows, .n = n, .eps = eps, .offset = offset};
    return norm_on_threads(&a, residual ? fc_ns.norm_residual : fc_ns.rms_norm);
}

fc_status fc_layer_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                        const float *bias, const fc_rows *rows, ptrdiff_t n, float eps) {
    struct norm a = {.k = fc_k, .type = type, .centred = 1, .out = out, .h = h, .x = x, .residual = residual,
                     .weight = weight, .bias = bias, .rows = rows, .n = n, .eps = eps};
    return norm_on_threads(&a, residual ? fc_ns.norm_residual : fc_ns.layer_norm);
}
