/* How a row of attention begins and ends: fresh and with its result, or with what it carries from piece to piece of its
 * keys. A piece begins at a multiple of FC_KV_CHUNK, so its chunks are those of a call over all keys, folded in the same
 * order: the bits after the last piece are that call's. */
#include <math.h>
#include <string.h>

#include "../rows.h"
#include "attention.h"

/* (E + 2): o, max, sum; on any byte */
static char *carried_row(const struct attention *ctx, const struct where *w, ptrdiff_t row) {
    const fc_attention_args *args = ctx->args;
    const ptrdiff_t q = w->q0 + row / ctx->group, head = w->g * ctx->group + row % ctx->group;
    return (char *)args->carried + w->b * args->carried_stride + (q * args->heads + head) * (args->v_dim + 2) * 4;
}

void fc_attention_begin_row(const struct attention *ctx, const struct where *w, ptrdiff_t row, float *o, float *max,
                            float *sum) {
    const ptrdiff_t e = ctx->args->v_dim;
    *max = -INFINITY, *sum = 0.0f;
    if (!ctx->args->carried) return;
    const char *from = carried_row(ctx, w, row);
    memcpy(max, from + e * 4, 4);
    memcpy(sum, from + e * 4 + 4, 4);
    memcpy(o, from, (size_t)e * 4);
    memset(o + e, 0, (size_t)(ctx->e_padded - e) * 4);
}

static void finish_row(const struct attention *ctx, const struct where *w, ptrdiff_t row, float *o, float top,
                       float total) {
    const fc_attention_args *args = ctx->args;
    const ptrdiff_t q = w->q0 + row / ctx->group, head = w->g * ctx->group + row % ctx->group;
    float keep = 1.0f;
    if (total == 0.0f) {
        top = -INFINITY, keep = 0.0f;
        for (ptrdiff_t j = 0; j < args->v_dim; j++) o[j] = 0.0f;
    }
    const float sink = args->sinks ? fc_get_float(args->sinks, head) : -INFINITY;
    if (sink != -INFINITY) {
        const float higher = sink > top ? sink : top;
        keep = total == 0.0f ? 0.0f : expf(top - higher);
        total = total * keep + expf(sink - higher);
        top = higher;
    }
    if (ctx->bytes && args->v_dim) ctx->k->hadamard(o, args->v_dim);
    if (args->lse)
        fc_put_float(args->lse, (w->b * args->q_len + q) * args->heads + head,
                     total == 0.0f ? -INFINITY : top + logf(total));
    ctx->k->from_f32[args->q_type]((char *)args->out + w->b * args->out_stride[0] + q * args->out_stride[1] +
                                       head * args->out_stride[2],
                                   o, args->v_dim, total == 0.0f ? 0.0f : keep / total);
}

void fc_attention_end_row(const struct attention *ctx, const struct where *w, ptrdiff_t row, float *o, float max,
                          float sum) {
    const ptrdiff_t e = ctx->args->v_dim;
    if (!ctx->args->carried || ctx->args->finish) {
        finish_row(ctx, w, row, o, max, sum);
        return;
    }
    char *to = carried_row(ctx, w, row);
    memcpy(to, o, (size_t)e * 4);
    memcpy(to + e * 4, &max, 4);
    memcpy(to + e * 4 + 4, &sum, 4);
}
