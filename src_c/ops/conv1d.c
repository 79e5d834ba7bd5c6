/* Depthwise causal convolution: an item is a run of tokens of one sequence. The first width - 1 tokens of a sequence
 * look back into the state, and are computed from a float32 copy of it with what follows; all others where x lies. */
#include "rows.h"

enum { AT_ONCE = 4, RUN = 64 }; /* tokens that the kernel takes; tokens of an item */

struct conv1d_run {
    const struct fc_kernels *k;
    const fc_conv1d_args *args;
    const float *weight; /* panels */
    ptrdiff_t x_bytes, runs, head; /* bytes of a token; runs of a sequence; tokens that look back into the state */
    fc_scratch looking_back; /* a thread: (width - 1 + head, channels), then results (AT_ONCE, channels), float32 */
    const float *rows; /* (width, ldw): the weights of tokens that go past the caches, or NULL */
    ptrdiff_t ldw;
};

static const char *x_at(const fc_conv1d_args *args, ptrdiff_t b, ptrdiff_t t) {
    return (const char *)args->x + b * args->x_stride[0] + t * args->x_stride[1];
}
static char *out_at(const fc_conv1d_args *args, ptrdiff_t b, ptrdiff_t t) {
    return (char *)args->out + b * args->out_stride[0] + t * args->out_stride[1];
}
static const float *state_at(const fc_conv1d_args *args, ptrdiff_t b, ptrdiff_t t) {
    const char *state = (const char *)args->state + b * args->state_stride[0] + t * args->state_stride[1];
    return (const float *)(const void *)state;
}

/* Tokens [0, head) of row b, sums in float32 first: the bits of the kernel for x's own type. */
static void convolve_head(const struct conv1d_run *ctx, ptrdiff_t b, float *rows) {
    const fc_conv1d_args *args = ctx->args;
    const ptrdiff_t back = args->width - 1, n = args->channels, bytes = n * 4;
    float *out = rows + (back + ctx->head) * n;
    for (ptrdiff_t j = 0; j < back; j++) {
        if (args->state) memcpy(rows + j * n, state_at(args, b, j), (size_t)bytes);
        else memset(rows + j * n, 0, (size_t)bytes);
    }
    for (ptrdiff_t t = 0; t < ctx->head; t++)
        ctx->k->to_f32[args->type](rows + (back + t) * n, x_at(args, b, t), n, 1.0f);
    for (ptrdiff_t t = 0; t < ctx->head; t += AT_ONCE) {
        const ptrdiff_t count = fc_smaller(AT_ONCE, ctx->head - t);
        ctx->k->conv1d[FC_F32](out, bytes, rows + t * n, bytes, ctx->weight, args->bias, n, count, args->width, 0);
        for (ptrdiff_t r = 0; r < count; r++) {
            if (args->silu) ctx->k->silu_of_sums[args->type](out_at(args, b, t + r), out + r * n, n);
            else fc_convert_row(ctx->k, args->type, out_at(args, b, t + r), FC_F32, out + r * n, n, 1.0f);
        }
    }
}

/* Tokens [begin, end) of row b, none of which looks back into the state. */
static void convolve_tokens(const struct conv1d_run *ctx, ptrdiff_t b, ptrdiff_t begin, ptrdiff_t end,
                            struct fc_seams *seams) {
    const fc_conv1d_args *args = ctx->args;
    const ptrdiff_t n = args->channels;
    for (ptrdiff_t t = begin; t < end; t += AT_ONCE) {
        const ptrdiff_t count = fc_smaller(AT_ONCE, end - t);
        char *out = out_at(args, b, t);
        const char *x = x_at(args, b, t - args->width + 1);
        if (ctx->rows && count == AT_ONCE)
            ctx->k->conv1d_streamed[args->type](seams, out, x, args->x_stride[1], ctx->rows, ctx->ldw, args->bias, n,
                                                args->width, args->silu);
        else
            ctx->k->conv1d[args->type](out, args->out_stride[1], x, args->x_stride[1], ctx->weight, args->bias, n,
                                       count, args->width, args->silu);
    }
}

/* Runs of one row go on without a break. */
static void convolve_runs(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct conv1d_run *ctx = context;
    struct fc_seams seams = {.from = AT_ONCE};
    for (ptrdiff_t i = begin, next; i < end; i = next) {
        const ptrdiff_t b = i / ctx->runs, row = b * ctx->runs, first = (i - row) * RUN;
        next = fc_smaller(end, row + ctx->runs);
        const ptrdiff_t stop = fc_smaller((next - row) * RUN, ctx->args->seq);
        if (first == 0 && ctx->head) convolve_head(ctx, b, fc_scratch_of(&ctx->looking_back, rank));
        convolve_tokens(ctx, b, first < ctx->head ? ctx->head : first, stop, &seams);
    }
    ctx->k->seams_end(&seams);
}

/* The last width - 1 inputs, in order: the new state may be the old one. */
static void keep_state(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct conv1d_run *ctx = context;
    const fc_conv1d_args *args = ctx->args;
    const ptrdiff_t back = args->width - 1;
    (void)rank;
    for (ptrdiff_t i = begin * back; i < end * back; i++) {
        const ptrdiff_t b = i / back, j = i % back, t = args->seq - back + j;
        char *to = (char *)args->new_state + b * args->new_state_stride[0] + j * args->new_state_stride[1];
        if (t >= 0) ctx->k->to_f32[args->type]((float *)(void *)to, x_at(args, b, t), args->channels, 1.0f);
        else if (args->state) memmove(to, state_at(args, b, t + back), (size_t)args->channels * 4);
        else memset(to, 0, (size_t)args->channels * 4);
    }
}

/* Panels from (channels, width), or as they came */
static fc_status lay_out_weight(struct conv1d_run *ctx, fc_scratch *panels) {
    const fc_conv1d_args *args = ctx->args;
    const ptrdiff_t panel = FC_PANEL * args->width, count = (args->channels + FC_PANEL - 1) / FC_PANEL;
    ctx->weight = args->weight;
    if (args->layout == FC_PACKED_F32) return FC_OK;
    if (fc_scratch_alloc(args->workspace, panels, 1, (size_t)fc_times(fc_times(count, panel), 4))) return FC_NO_MEMORY;
    float *to = (float *)(void *)panels->base;
    ctx->weight = to;
    for (ptrdiff_t p = 0; p < count; p++)
        ctx->k->panel_cols[args->weight_type](to + p * panel, (const char *)args->weight + p * FC_PANEL * args->ldw,
                                              args->ldw, args->width,
                                              fc_smaller(FC_PANEL, args->channels - p * FC_PANEL));
    return FC_OK;
}

/* Large results go past the caches, if their rows allow it: weights lie in rows then, as vectors of channels begin
 * where those of out are aligned. */
static fc_status lay_out_rows(struct conv1d_run *ctx, fc_scratch *rows) {
    const fc_conv1d_args *args = ctx->args;
    const ptrdiff_t width = args->width, n = fc_round_up(args->channels, FC_PANEL);
    if (!fc_should_stream((double)args->batch * (double)args->seq * (double)ctx->x_bytes, 0)) return FC_OK;
    if (args->out_stride[1] != ctx->x_bytes || ctx->x_bytes % FC_LINE ||
        (uintptr_t)args->out % (size_t)fc_size_of(args->type))
        return FC_OK;
    if (fc_scratch_alloc(args->workspace, rows, 1, (size_t)fc_times(fc_times(n, width), 4))) return FC_NO_MEMORY;
    float *to = (float *)(void *)rows->base;
    ctx->rows = to, ctx->ldw = n;
    for (ptrdiff_t k = 0; k < width; k++)
        for (ptrdiff_t c = 0; c < n; c += FC_PANEL)
            memcpy(to + k * n + c, ctx->weight + c * width + k * FC_PANEL, FC_PANEL * 4);
    return FC_OK;
}

static fc_status convolve(struct conv1d_run *ctx) {
    const fc_conv1d_args *args = ctx->args;
    const ptrdiff_t back = args->width - 1, items = args->batch * ctx->runs;
    const double channel_ns = args->silu ? fc_ns.conv1d + fc_ns.activation[FC_SILU] : fc_ns.conv1d;
    const double ns = (double)args->channels * channel_ns * (double)fc_smaller(RUN, args->seq);
    const int threads = fc_threads_for(items, ns);
    const ptrdiff_t rows = fc_plus(back, ctx->head + AT_ONCE);
    if (ctx->head && fc_scratch_alloc(args->workspace, &ctx->looking_back, threads,
                                      (size_t)fc_times(rows, fc_times(args->channels, 4))))
        return FC_NO_MEMORY;
    return fc_static(threads, items, ns, convolve_runs, ctx);
}

fc_status fc_conv1d(const fc_conv1d_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    fc_scratch panels = {0}, rows = {0};
    struct conv1d_run ctx = {.k = fc_k, .args = args, .x_bytes = args->channels * fc_size_of(args->type),
                             .runs = (args->seq + RUN - 1) / RUN, .head = fc_smaller(args->width - 1, args->seq)};
    fc_status status = lay_out_weight(&ctx, &panels);
    if (status == FC_OK) status = lay_out_rows(&ctx, &rows);
    if (status == FC_OK) status = convolve(&ctx);
    fc_scratch_free(&ctx.looking_back);
    fc_scratch_free(&rows);
    fc_scratch_free(&panels);
    if (status != FC_OK || args->width == 1) return status;
    const double ns = (double)((args->width - 1) * args->channels) * fc_ns.convert;
    return fc_static(fc_threads_for(args->batch, ns), args->batch, ns, keep_state, &ctx);
}
