/* Selective scan: an item is a block of channels of one sequence. A thread takes all its blocks of a sequence through a
 * run of tokens before any goes on to the next: a block's part of a token is a few lines, and the next block's lies
 * beside it. */
#include "rows.h"

enum { BLOCK = 64, RUN = 16, PANELS = BLOCK / FC_PANEL }; /* channels of an item; tokens of a run */
enum { OF_RUN = FC_PANEL * RUN, MOST = 64 }; /* MOST: blocks whose states and A stay in a second cache */

struct scan {
    const struct fc_kernels *k;
    const fc_scan_args *args;
    ptrdiff_t size, blocks; /* bytes of a value; blocks of channels */
    ptrdiff_t most;         /* blocks that a thread takes together */
    struct fc_span span;
    fc_scratch scratch;     /* a thread: struct tile's arrays */
};

/* A thread's scratch: states and A of its blocks; what one of them has in a run */
struct tile {
    float *h, *a;            /* (most, PANELS, n, FC_PANEL) */
    float *step, *input, *y; /* (PANELS, RUN, FC_PANEL) */
    float *b, *c;            /* (RUN, n) */
};

static ptrdiff_t tile_floats(ptrdiff_t n, ptrdiff_t most) {
    return fc_plus(fc_times(n, most * 2 * BLOCK + 2 * RUN), 3 * PANELS * OF_RUN);
}

static struct tile tile_in(float *at, ptrdiff_t n, ptrdiff_t most) {
    struct tile t;
    t.step = at;
    t.input = t.step + PANELS * OF_RUN;
    t.y = t.input + PANELS * OF_RUN;
    t.b = t.y + PANELS * OF_RUN;
    t.c = t.b + RUN * n;
    t.h = t.c + RUN * n;
    t.a = t.h + most * BLOCK * n;
    return t;
}

/* token, or channel, t of row b */
static const char *token_of(const void *x, const ptrdiff_t stride[2], ptrdiff_t b, ptrdiff_t t) {
    return (const char *)x + b * stride[0] + t * stride[1];
}

/* Tokens [t0, t0 + tokens) of row b, channels [c0, c0 + channels): what they have outside the loop over states. */
static void begin_run(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t t0, ptrdiff_t tokens,
                      ptrdiff_t c0, ptrdiff_t channels) {
    const fc_scan_args *args = ctx->args;
    const float *bias = args->delta_bias ? args->delta_bias + c0 : NULL;
    const float *d = args->d ? args->d + c0 : NULL;
    for (ptrdiff_t r = 0; r < tokens; r++) {
        const ptrdiff_t at = r * FC_PANEL;
        const char *u = token_of(args->u, args->u_stride, b, t0 + r) + c0 * ctx->size;
        const char *delta = token_of(args->delta, args->delta_stride, b, t0 + r) + c0 * ctx->size;
        ctx->k->scan_begin[args->type](tile->step + at, tile->input + at, tile->y + at, OF_RUN, u, delta, bias, d,
                                       channels, args->delta_softplus, u + RUN * args->u_stride[1],
                                       delta + RUN * args->delta_stride[1]);
    }
}

/* B and C, which all channels share */
static void share_run(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t t0, ptrdiff_t tokens) {
    const fc_scan_args *args = ctx->args;
    for (ptrdiff_t r = 0; r < tokens; r++) {
        ctx->k->to_f32[args->type](tile->b + r * args->n, token_of(args->b, args->b_stride, b, t0 + r), args->n, 1.0f);
        ctx->k->to_f32[args->type](tile->c + r * args->n, token_of(args->c, args->c_stride, b, t0 + r), args->n, 1.0f);
    }
}

static void end_run(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t t0, ptrdiff_t tokens,
                    ptrdiff_t c0, ptrdiff_t channels) {
    const fc_scan_args *args = ctx->args;
    for (ptrdiff_t r = 0; r < tokens; r++) {
        char *out = (char *)args->out + b * args->out_stride[0] + (t0 + r) * args->out_stride[1] + c0 * ctx->size;
        const char *z = args->z ? token_of(args->z, args->z_stride, b, t0 + r) + c0 * ctx->size : NULL;
        ctx->k->scan_end[args->type](out, tile->y + r * FC_PANEL, OF_RUN, z, channels,
                                     z ? z + RUN * args->z_stride[1] : NULL);
    }
}

/* A and the state into panels, channel c0 + 16 p first in panel p */
static void load_panels(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t c0,
                        ptrdiff_t channels) {
    const fc_scan_args *args = ctx->args;
    const void *before = ctx->span.begin ? args->new_state : args->state;
    const ptrdiff_t *stride = ctx->span.begin ? args->new_state_stride : args->state_stride;
    for (ptrdiff_t p = 0; p * FC_PANEL < channels; p++) {
        const ptrdiff_t c = c0 + p * FC_PANEL, count = fc_smaller(FC_PANEL, channels - p * FC_PANEL);
        float *h = tile->h + p * FC_PANEL * args->n, *a = tile->a + p * FC_PANEL * args->n;
        const char *state = before ? token_of(before, stride, b, c) : NULL;
        ctx->k->panel_cols[FC_F32](a, (const char *)args->a + c * args->lda, args->lda, args->n, count);
        if (state) ctx->k->panel_cols[FC_F32](h, state, stride[1], args->n, count);
        else memset(h, 0, (size_t)(FC_PANEL * args->n) * 4);
    }
}

static void store_state(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t c0,
                        ptrdiff_t channels) {
    const fc_scan_args *args = ctx->args;
    for (ptrdiff_t p = 0; p * FC_PANEL < channels; p++) {
        char *to = (char *)args->new_state + b * args->new_state_stride[0] +
                   (c0 + p * FC_PANEL) * args->new_state_stride[1];
        ctx->k->panel_to_columns((float *)(void *)to, args->new_state_stride[1], tile->h + p * FC_PANEL * args->n,
                                 args->n, fc_smaller(FC_PANEL, channels - p * FC_PANEL));
    }
}

/* Channels [c0, c0 + channels) of row b */
static void scan_channels(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t c0,
                          ptrdiff_t channels) {
    const fc_scan_args *args = ctx->args;
    load_panels(ctx, tile, b, c0, channels);
    for (ptrdiff_t t = ctx->span.begin; t < ctx->span.end; t += RUN) {
        const ptrdiff_t tokens = fc_smaller(RUN, ctx->span.end - t);
        share_run(ctx, tile, b, t, tokens);
        for (ptrdiff_t c = 0; c < channels; c += BLOCK) {
            const ptrdiff_t count = fc_smaller(BLOCK, channels - c);
            begin_run(ctx, tile, b, t, tokens, c0 + c, count);
            const struct fc_scan s = {.h = tile->h + c * args->n, .a = tile->a + c * args->n, .step = tile->step,
                                      .input = tile->input, .y = tile->y, .b = tile->b, .c = tile->c, .tokens = tokens,
                                      .n = args->n, .channels = count, .stride = OF_RUN};
            ctx->k->scan(&s);
            end_run(ctx, tile, b, t, tokens, c0 + c, count);
        }
    }
    store_state(ctx, tile, b, c0, channels);
}

static void scan_blocks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct scan *ctx = context;
    const struct tile tile = tile_in(fc_scratch_of(&ctx->scratch, rank), ctx->args->n, ctx->most);
    for (ptrdiff_t next; begin < end; begin = next) {
        const ptrdiff_t b = begin / ctx->blocks, c0 = begin % ctx->blocks * BLOCK;
        next = fc_smaller(fc_smaller(end, (b + 1) * ctx->blocks), begin + ctx->most);
        scan_channels(ctx, &tile, b, c0, fc_smaller((next - begin) * BLOCK, ctx->args->channels - c0));
    }
}

fc_status fc_selective_scan(const fc_scan_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    struct scan ctx = {.k = fc_k, .args = args, .size = fc_size_of(args->type),
                       .blocks = (args->channels + BLOCK - 1) / BLOCK};
    const ptrdiff_t items = args->batch * ctx.blocks;
    const double channels = (double)fc_smaller(BLOCK, args->channels), n = (double)args->n;
    const double span = (double)fc_smaller(FC_SPAN, args->seq);
    const double ns = channels * (span * (n * fc_ns.scan + fc_ns.scan_channel) + n * fc_ns.scan_load);
    const int threads = fc_threads_for(items, ns);
    ctx.most = fc_smaller(fc_smaller(ctx.blocks, (items + threads - 1) / threads), MOST);
    if (fc_scratch_alloc(args->workspace, &ctx.scratch, threads, (size_t)fc_times(tile_floats(args->n, ctx.most), 4)))
        return FC_NO_MEMORY;
    const fc_status status = fc_static_spans(threads, items, ns, scan_blocks, &ctx, args->seq, &ctx.span);
    fc_scratch_free(&ctx.scratch);
    return status;
}
