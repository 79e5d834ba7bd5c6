/* What a part of a layer is given in a forward pass, and the steps that parts share. A part allocates only from the
 * pass's workspace, knows no thread and no instruction set: it says which ops run, in what order. */
#ifndef FC_PASS_H
#define FC_PASS_H

#include "../ops/rows.h"

struct pass {
    const struct fc_kernels *k;
    fc_workspace *workspace;
    ptrdiff_t batch, seq, rows, hidden; /* rows M = B * S */
    const int64_t *start; /* (B) tokens that a row's states hold */
    int64_t *positions;   /* (M) */
    int64_t *lens;        /* (B) start + S */
    int64_t longest;      /* of lens */
    const float *embedded; /* (M, hidden): what the first layer was given; NULL: no layer looks at it */
    /* Behind a router rows have counts (B) tokens, M in all, one after the other, else NULL; S is what they had before.
     * kv_positions (B, kv_room): where the tokens lie that went through, these included. */
    const int64_t *counts, *kv_positions;
    ptrdiff_t kv_room;
};

/* Of (rows, n) float32 */
static inline ptrdiff_t float_bytes(ptrdiff_t rows, ptrdiff_t n) { return fc_times(fc_times(rows, n), 4); }

/* out (M, hidden) = part(norm(x (M, hidden))) + residual (M, hidden); residual may be NULL or out itself */
typedef fc_status part_of_layer(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                                const float *residual);
part_of_layer attention_part, mlp_part, called_part, mamba_part, mamba2_part,
    short_conv_part, rg_lru_part;

/* x (M, hidden) = layer(x); y: as large; states: the mixer's, then that of what is beside or ahead. run_layer takes no
 * notice of a router, routed_layer runs its tokens alone. */
fc_status run_layer(const struct pass *p, const fc_layer *layer, void *const *states, float *x, float *y);
fc_status routed_layer(const struct pass *p, const fc_layer *layer, const fc_routed_state *state, float *x);

/* out (M, n) = norm(x (M, k)) W + residual (M, n), rows of out and residual out_stride floats apart, of x x_stride; norm
 * and residual may be NULL; gated: out (M, n), contiguous, = f(..) * (..), see fc_linear */
fc_status project(const struct pass *p, float *out, ptrdiff_t out_stride, const float *x, ptrdiff_t rows,
                  ptrdiff_t x_stride, const fc_matrix *w, ptrdiff_t k, ptrdiff_t n, const fc_norm *norm,
                  const float *residual);
fc_status project_gated(const struct pass *p, float *out, const float *x, const fc_matrix *w, ptrdiff_t k, ptrdiff_t n,
                        const fc_norm *norm, fc_activation activation);

/* out = norm(x) over rows of n, a multiple of `heads` of them to a row of `row` floats; in place or not */
fc_status normalise(float *out, const float *x, const fc_norm *norm, ptrdiff_t rows, ptrdiff_t row, ptrdiff_t heads,
                    ptrdiff_t n);

/* out = x + scale y, (M, hidden) each; out may be x or y */
fc_status add_scaled(const struct pass *p, float *out, const float *x, const float *y, float scale);

/* y *= x, (M, n) each, rows y_row and x_row floats apart */
fc_status multiply(const struct pass *p, float *y, ptrdiff_t y_row, const float *x, ptrdiff_t x_row, ptrdiff_t n);

/* The part's last product: out (M, hidden) = y (M, n) W + residual (M, hidden), rows of y y_stride floats apart. Of a
 * part that is a share y is this rank's channels, and out has what the share gives. */
fc_status project_out(const struct pass *p, const fc_part *part, float *out, const float *y, ptrdiff_t y_stride,
                      const fc_matrix *w, ptrdiff_t n, const float *residual);

/* wide (M, inner->n) = y, this rank's channels, beside those of the others; to be freed whatever this returns */
fc_status widen(const struct pass *p, const fc_ranks *inner, fc_scratch *wide, const float *y, ptrdiff_t y_stride);

/* y (rows, n) = what all ranks give, of what this one has in it; as it is where no other holds a share */
static inline fc_status exchange(const fc_ranks *ranks, float *y, ptrdiff_t rows, ptrdiff_t n) {
    return ranks ? ranks->call(ranks->self, y, y + ranks->first, rows, n, n) : FC_OK;
}

/* y = f(y), (rows, n) */
fc_status activate(float *y, fc_activation f, ptrdiff_t rows, ptrdiff_t n);

#endif
