/* RMSNorm and its fused residual form over rows. */
#include "rows.h"

struct rms_norm {
    fc_dtype type;
    char *out, *h;
    const char *x, *residual;
    const float *weight;
    const fc_rows *rows;
    ptrdiff_t n;
    float eps, offset;
    ptrdiff_t row_bytes;
    int past, far;
    fc_scratch sums; /* a thread: a row of h on its way past the caches */
};

static void body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct rms_norm *a = ctx;
    struct fc_past past[2] = {{0}};
    fc_cursor c;
    fc_cursor_at(&c, a->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c)) {
        const char *x = a->x + c.at[2], *residual = a->residual ? a->residual + c.at[3] : NULL;
        const int more = a->far && i + 1 < end;
        char *h = a->h ? a->h + c.at[1] : NULL, *room = a->sums.block ? fc_scratch_of(&a->sums, rank) : h;
        fc_k->rms_norm[a->type](a->out + c.at[0], room, x, residual, a->weight, a->n, a->eps, a->offset,
                              more ? x + a->row_bytes : NULL, a->past ? past : NULL);
        if (room != h) fc_k->stream(past + 1, h, room, a->row_bytes, more ? residual + a->row_bytes : NULL);
    }
    if (a->past) fc_k->stream_end(past);
    if (a->sums.block) fc_k->stream_end(past + 1);
}

fc_status fc_rms_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                      const fc_rows *rows, ptrdiff_t n, float eps, float offset) {
    struct rms_norm a = {type, out, h, x, residual, weight, rows, n, eps, offset, 0, 0, 0, {0}};
    const ptrdiff_t count = fc_rows_count(rows);
    a.row_bytes = n * fc_size_of(type);
    const double ns = (double)n * (residual ? 0.3 : 0.15) + 20;
    const int threads = fc_threads_for(count, ns);
    a.far = fc_far((double)count * (double)a.row_bytes);
    a.past = fc_past_cache((double)count * (double)a.row_bytes, out == x || out == residual);
    if (a.past && residual && h != x && h != residual && fc_scratch_alloc(&a.sums, threads, (size_t)a.row_bytes))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, count, ns, body, &a);
    fc_scratch_free(&a.sums);
    return status;
}
