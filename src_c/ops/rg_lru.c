/* RG-LRU: an item is a block of channels of one sequence, which passes over a span of tokens run after run, in
 * float32. */
#include "rows.h"

enum { BLOCK = 128, RUN = 8, ARRAYS = 3 }; /* channels of an item; tokens of a run; x and its two gates */

struct rg_lru {
    const struct fc_kernels *k;
    const fc_rg_lru_args *args;
    const void *inputs[ARRAYS];
    const ptrdiff_t *strides[ARRAYS];
    ptrdiff_t size, blocks; /* bytes of a value; blocks of channels */
    struct fc_span span;
    fc_scratch scratch;     /* a thread: rates (BLOCK), then the inputs of a run (ARRAYS, RUN, BLOCK) */
};

/* Token t of row b in array i, channel c */
static const char *input_at(const struct rg_lru *ctx, int i, ptrdiff_t b, ptrdiff_t t, ptrdiff_t c) {
    return (const char *)ctx->inputs[i] + b * ctx->strides[i][0] + t * ctx->strides[i][1] + c * ctx->size;
}

/* Tokens from t on, channels from c on: s->tokens of them, s->channels of those. */
static void run_tokens(const struct rg_lru *ctx, struct fc_rg_lru *s, float *tiles, ptrdiff_t b, ptrdiff_t t,
                       ptrdiff_t c) {
    const fc_rg_lru_args *args = ctx->args;
    for (int i = 0; i < ARRAYS; i++) {
        for (ptrdiff_t k = 0; k < s->tokens; k++)
            ctx->k->to_f32[args->type](tiles + (i * RUN + k) * BLOCK, input_at(ctx, i, b, t + k, c), s->channels, 1.0f);
        s->next[i] = input_at(ctx, i, b, t + RUN, c);
    }
    if (args->reset) s->begins = args->reset + b * args->reset_stride[0] + t * args->reset_stride[1];
    ctx->k->rg_lru(s);
    char *out = (char *)args->out + b * args->out_stride[0] + t * args->out_stride[1] + c * ctx->size;
    for (ptrdiff_t k = 0; k < s->tokens; k++)
        ctx->k->from_f32[args->type](out + k * args->out_stride[1], tiles + k * BLOCK, s->channels, 1.0f);
}

static void run_block(const struct rg_lru *ctx, float *scratch, ptrdiff_t b, ptrdiff_t c) {
    const fc_rg_lru_args *args = ctx->args;
    float *tiles = scratch + BLOCK, *tile = tiles + RUN * BLOCK;
    struct fc_rg_lru s = {.x = tiles, .i = tile, .r = tile + RUN * BLOCK, .rate = scratch, .row = BLOCK,
                          .channels = fc_smaller(BLOCK, args->channels - c), .size = ctx->size,
                          .begins_stride = args->reset_stride[1],
                          .to = (float *)(void *)((char *)args->new_state + b * args->new_state_stride) + c};
    for (int i = 0; i < ARRAYS; i++) s.next_stride[i] = ctx->strides[i][1];
    const char *state = (const char *)args->state;
    if (ctx->span.begin) s.from = s.to;
    else if (state) s.from = (const float *)(const void *)(state + b * args->state_stride) + c;
    if (s.channels < BLOCK) memset(scratch, 0, (1 + ARRAYS * RUN) * BLOCK * 4); /* lanes beyond the last channel */
    ctx->k->rg_lru_rates(scratch, args->param + c, s.channels);
    ptrdiff_t t = ctx->span.begin;
    do { /* once where there are no tokens: the state is copied */
        s.tokens = fc_smaller(RUN, ctx->span.end - t);
        run_tokens(ctx, &s, tiles, b, t, c);
        s.from = s.to;
        t += RUN;
    } while (t < ctx->span.end);
}

static void run_blocks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct rg_lru *ctx = context;
    float *scratch = fc_scratch_of(&ctx->scratch, rank);
    for (ptrdiff_t i = begin; i < end; i++) run_block(ctx, scratch, i / ctx->blocks, i % ctx->blocks * BLOCK);
}

fc_status fc_rg_lru(const fc_rg_lru_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    struct rg_lru ctx = {.k = fc_k, .args = args, .size = fc_size_of(args->type),
                         .inputs = {args->x, args->input_gate, args->recurrence_gate},
                         .strides = {args->x_stride, args->input_gate_stride, args->recurrence_gate_stride},
                         .blocks = (args->channels + BLOCK - 1) / BLOCK};
    const ptrdiff_t items = args->batch * ctx.blocks;
    const double tokens = (double)fc_smaller(FC_SPAN, args->seq) + 1;
    const double ns = (double)fc_smaller(BLOCK, args->channels) * tokens * fc_ns.rg_lru;
    const int threads = fc_threads_for(items, ns);
    if (fc_scratch_alloc(args->workspace, &ctx.scratch, threads, (1 + ARRAYS * RUN) * BLOCK * 4)) return FC_NO_MEMORY;
    const fc_status status = fc_static_spans(threads, items, ns, run_blocks, &ctx, args->seq, &ctx.span);
    fc_scratch_free(&ctx.scratch);
    return status;
}
