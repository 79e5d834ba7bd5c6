/* Scales and minima for columns of a weight that become integers. Chooses nothing else, and packs nothing. */
#include "rows.h"

struct columns {
    const fc_search_args *args;
    const struct fc_kernels *kernels;
    struct fc_search search;
    fc_scratch scratch;
    ptrdiff_t block_k, blocks, lines; /* of out for a block */
};

/* A panel of columns: (k, FC_PANEL) float32, then out, line after line */
static void search_panels(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct columns *ctx = context;
    const fc_search_args *a = ctx->args;
    float *panel = fc_scratch_of(&ctx->scratch, rank);
    float *found = panel + ctx->block_k * FC_PANEL; /* (lines, FC_PANEL) */
    for (ptrdiff_t p = begin; p < end; p++) {
        const ptrdiff_t n = fc_smaller(FC_PANEL, a->n - p * FC_PANEL);
        const char *w = (const char *)a->w + p * FC_PANEL * a->ldw;
        for (ptrdiff_t b = 0; b < ctx->blocks; b++) {
            ctx->kernels->panel_cols[FC_F32](panel, w + b * ctx->block_k * 4, a->ldw, ctx->block_k, n);
            ctx->kernels->search(found, panel, a->importance + b * ctx->block_k, &ctx->search);
            for (ptrdiff_t j = 0; j < n; j++)
                for (ptrdiff_t line = 0; line < ctx->lines; line++)
                    a->out[((p * FC_PANEL + j) * ctx->blocks + b) * ctx->lines + line] = found[line * FC_PANEL + j];
        }
    }
}

fc_status fc_search_scales(const fc_search_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    struct columns ctx = {.args = args, .kernels = fc_k, .block_k = args->group * args->groups};
    ctx.search = (struct fc_search){args->group, args->groups, args->minima, args->zero, args->top};
    ctx.blocks = args->k / ctx.block_k;
    ctx.lines = args->groups > 1 ? 2 + 2 * args->groups : 2;
    const ptrdiff_t panels = fc_round_up(args->n, FC_PANEL) / FC_PANEL;
    const double ns = (double)args->k * fc_ns.search;
    const ptrdiff_t floats = (ctx.block_k + ctx.lines) * FC_PANEL;
    if (fc_scratch_alloc(NULL, &ctx.scratch, 1, (size_t)floats * 4)) return FC_NO_MEMORY;
    /* on the calling thread: pieces of a weight come from threads of the caller's */
    const fc_status status = fc_static(1, panels, ns, search_panels, &ctx);
    fc_scratch_free(&ctx.scratch);
    return status;
}
