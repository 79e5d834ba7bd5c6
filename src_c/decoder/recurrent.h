/* What parts with a recurrent state share: where a row's state lies before the pass and after it, and the convolution
 * before the scan.
 *
 * Rows of a batch that are at the same slots are one call of an op; others are a call each, of the same bits. */
#ifndef FC_RECURRENT_H
#define FC_RECURRENT_H

#include "pass.h"

/* Of rows [row, row + batch), the first one's slots: the others' are `apart` bytes on */
struct rows_state {
    ptrdiff_t row, batch, apart;
    const float *from; /* NULL: zeros */
    float *to;
};

/* How many calls: 1, or one a row; call i of them */
ptrdiff_t state_calls(const fc_recurrent_state *s, ptrdiff_t batch);
struct rows_state state_of_call(const fc_recurrent_state *s, ptrdiff_t batch, ptrdiff_t calls, ptrdiff_t i);

/* What the caller wants called before a pass reads the state, or, `written`, when it is whole */
static inline fc_status relay(const fc_recurrent_state *s, int written) {
    return s->relay ? s->relay(s->self, written) : FC_OK;
}

/* out (M, channels) = silu or not (conv(x)), rows of x x_row bytes apart; the state is the first (width - 1, channels)
 * floats of a slot. All parts begin with it: it is what awaits the state. */
fc_status convolve(const struct pass *p, const fc_recurrent_state *s, float *out, const float *x, ptrdiff_t x_row,
                   const fc_conv_weights *w, ptrdiff_t channels, int silu);

#endif
