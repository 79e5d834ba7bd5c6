/* Selective scan: an item is a block of channels of one sequence, which it passes over run of tokens after run. */
#include "rows.h"

enum { BLOCK = 64, RUN = 16, PANELS = BLOCK / FC_PANEL }; /* channels of an item; tokens of a run */
enum { OF_RUN = FC_PANEL * RUN };

struct scan {
    const struct fc_kernels *k;
    const fc_scan_args *args;
    ptrdiff_t size, blocks; /* bytes of a value; blocks of channels */
    fc_scratch scratch;     /* a thread: struct tile's arrays */
};

/* A thread's scratch: a block over a run */
struct tile {
    float *h, *a;            /* (PANELS, n, FC_PANEL) */
    float *step, *input, *y; /* (PANELS, RUN, FC_PANEL) */
    float *b, *c;            /* (RUN, n) */
};

static ptrdiff_t tile_floats(ptrdiff_t n) { return fc_plus(fc_times(n, 2 * BLOCK + 2 * RUN), 3 * PANELS * OF_RUN); }

static struct tile tile_in(float *at, ptrdiff_t n) {
    struct tile t;
    t.step = at;
    t.input = t.step + PANELS * OF_RUN;
    t.y = t.input + PANELS * OF_RUN;
    t.h = t.y + PANELS * OF_RUN;
    t.a = t.h + BLOCK * n;
    t.b = t.a + BLOCK * n;
    t.c = t.b + RUN * n;
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

/* A and the state into the block's panels, channel c0 + 16 p first in panel p */
static void load_panels(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t c0,
                        ptrdiff_t channels) {
    const fc_scan_args *args = ctx->args;
    for (ptrdiff_t p = 0; p * FC_PANEL < channels; p++) {
        const ptrdiff_t c = c0 + p * FC_PANEL, count = fc_smaller(FC_PANEL, channels - p * FC_PANEL);
        float *h = tile->h + p * FC_PANEL * args->n, *a = tile->a + p * FC_PANEL * args->n;
        const char *state = args->state ? token_of(args->state, args->state_stride, b, c) : NULL;
        ctx->k->panel_cols[FC_F32](a, (const char *)args->a + c * args->lda, args->lda, args->n, count);
        if (state) ctx->k->panel_cols[FC_F32](h, state, args->state_stride[1], args->n, count);
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

static void scan_block(const struct scan *ctx, const struct tile *tile, ptrdiff_t b, ptrdiff_t c0) {
    const fc_scan_args *args = ctx->args;
    const ptrdiff_t channels = fc_smaller(BLOCK, args->channels - c0);
    load_panels(ctx, tile, b, c0, channels);
    for (ptrdiff_t t = 0; t < args->seq; t += RUN) {
        const ptrdiff_t tokens = fc_smaller(RUN, args->seq - t);
        begin_run(ctx, tile, b, t, tokens, c0, channels);
        const struct fc_scan s = {.h = tile->h, .a = tile->a, .step = tile->step, .input = tile->input, .y = tile->y,
                                  .b = tile->b, .c = tile->c, .tokens = tokens, .n = args->n, .channels = channels,
                                  .stride = OF_RUN};
        ctx->k->scan(&s);
        end_run(ctx, tile, b, t, tokens, c0, channels);
    }
    store_state(ctx, tile, b, c0, channels);
}

static void scan_blocks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct scan *ctx = context;
    const struct tile tile = tile_in(fc_scratch_of(&ctx->scratch, rank), ctx->args->n);
    for (ptrdiff_t i = begin; i < end; i++) scan_block(ctx, &tile, i / ctx->blocks, i % ctx->blocks * BLOCK);
}

fc_status fc_selective_scan(const fc_scan_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    struct scan ctx = {.k = fc_k, .args = args, .size = fc_size_of(args->type),
                       .blocks = (args->channels + BLOCK - 1) / BLOCK};
    const ptrdiff_t items = args->batch * ctx.blocks;
    const double channels = (double)fc_smaller(BLOCK, args->channels), n = (double)args->n, seq = (double)args->seq;
    const double ns = channels * (seq * (n * fc_ns.scan + fc_ns.scan_channel) + n * fc_ns.scan_load);
    const int threads = fc_threads_for(items, ns);
    if (fc_scratch_alloc(args->workspace, &ctx.scratch, threads, (size_t)fc_times(tile_floats(args->n), 4)))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns, scan_blocks, &ctx);
    fc_scratch_free(&ctx.scratch);
    return status;
}
