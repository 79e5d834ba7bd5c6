/* Columns of a weight, as checkpoints hold them, into panels: bytes move, no value changes. */
#include <string.h>

#include "rows.h"

struct pack {
    const struct fc_kernels *kernels;
    fc_dtype type;
    char *out;
    ptrdiff_t panel_stride;
    const char *w;
    ptrdiff_t ldw, k, n;
};

/* A pair of bfloat16 moves as one 32-bit word; the last of an odd k has no partner. */
static void pack_panels(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct pack *ctx = context;
    const ptrdiff_t words = ctx->type == FC_BF16 ? ctx->k / 2 : ctx->k;
    (void)rank;
    for (ptrdiff_t p = begin; p < end; p++) {
        const ptrdiff_t n = fc_smaller(FC_PANEL, ctx->n - p * FC_PANEL);
        const char *w = ctx->w + p * FC_PANEL * ctx->ldw;
        char *out = ctx->out + p * ctx->panel_stride;
        ctx->kernels->panel_cols[FC_F32]((float *)(void *)out, w, ctx->ldw, words, n);
        if (ctx->type == FC_F32 || ctx->k % 2 == 0) continue;
        memset(out + words * FC_LINE, 0, FC_LINE);
        for (ptrdiff_t j = 0; j < n; j++) memcpy(out + words * FC_LINE + j * 4, w + j * ctx->ldw + words * 4, 2);
    }
}

fc_status fc_pack_columns(fc_dtype type, void *out, ptrdiff_t panel_stride, const void *w, ptrdiff_t ldw, ptrdiff_t k,
                          ptrdiff_t n) {
    struct pack ctx = {fc_k, type, out, panel_stride, w, ldw, k, n};
    const ptrdiff_t panels = fc_round_up(n, FC_PANEL) / FC_PANEL;
    const double ns = (double)k * fc_ns.pack + fc_ns.pack_panel;
    return fc_static(fc_threads_for(panels, ns), panels, ns, pack_panels, &ctx);
}
