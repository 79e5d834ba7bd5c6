/* Rows of a recurrent state as ops take them, and the short convolution: see recurrent.h. */
#include "recurrent.h"

ptrdiff_t state_calls(const fc_recurrent_state *s, ptrdiff_t batch) {
    for (ptrdiff_t b = 1; b < batch; b++)
        if (s->from[b] != s->from[0] || s->to[b] != s->to[0]) return batch;
    return 1;
}

struct rows_state state_of_call(const fc_recurrent_state *s, ptrdiff_t batch, ptrdiff_t calls, ptrdiff_t i) {
    const ptrdiff_t row = s->slots * s->floats;
    return (struct rows_state){
        .row = i, .batch = calls == 1 ? batch : 1, .apart = row * 4,
        .from = s->from[i] < 0 ? NULL : s->memory + i * row + s->from[i] * s->floats,
        .to = s->memory + i * row + s->to[i] * s->floats};
}

fc_status convolve(const struct pass *p, const fc_recurrent_state *s, float *out, const float *x, ptrdiff_t x_row,
                   const fc_conv_weights *w, ptrdiff_t channels, int silu) {
    const ptrdiff_t calls = state_calls(s, p->batch), row = channels * 4;
    fc_status status = relay(s, 0);
    for (ptrdiff_t i = 0; i < calls && status == FC_OK; i++) {
        const struct rows_state r = state_of_call(s, p->batch, calls, i);
        status = fc_conv1d(&(fc_conv1d_args){
            .size = sizeof(fc_conv1d_args), .type = FC_F32, .out = out + r.row * p->seq * channels,
            .x = (const char *)x + r.row * p->seq * x_row, .new_state = r.to, .state = r.from, .layout = FC_PACKED_F32,
            .weight = w->panels, .bias = w->bias, .silu = silu, .batch = r.batch, .seq = p->seq, .channels = channels,
            .width = w->width, .out_stride = {p->seq * row, row}, .x_stride = {p->seq * x_row, x_row},
            .new_state_stride = {r.apart, row}, .state_stride = {r.apart, row}, .workspace = p->workspace});
    }
    return status;
}
