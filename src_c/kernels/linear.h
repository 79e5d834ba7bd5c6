/* Epilogues: a row of float32 accumulators to a row of the result.
 *   linear:  out = out_scale (acc + bias) + residual
 *   gated:   acc and biases hold panels [gate16][up16]...;  out = f(gate + bias) * (up + bias_up) */

FC_INLINE void linear_store_any(fc_dtype t, void *out, const float *acc, const float *bias, float out_scale,
                                const void *residual, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf v = vf_get_upto(FC_F32, acc, i, n);
        if (bias) v += vf_get_upto(FC_F32, bias, i, n);
        v *= out_scale;
        if (residual) v += vf_get_upto(t, residual, i, n);
        vf_put_upto(t, out, i, v, n);
    }
}

FC_INLINE void gated_store(fc_activation f, fc_dtype t, void *out, const float *acc, const float *bias,
                           const float *bias_up, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        const float *pair = acc + i / FC_PANEL * 2 * FC_PANEL + i % FC_PANEL;
        vf gate = vf_load(pair), up = vf_load(pair + FC_PANEL);
        if (bias) {
            gate += vf_get_upto(FC_F32, bias, i, n);
            up += vf_get_upto(FC_F32, bias_up, i, n);
        }
        vf_put_upto(t, out, i, vf_activate(f, gate) * up, n);
    }
}

FC_INLINE void gated_store_relu_any(fc_dtype t, void *out, const float *acc, const float *bias,
                                    const float *bias_up, ptrdiff_t n) {
    gated_store(FC_RELU, t, out, acc, bias, bias_up, n);
}
FC_INLINE void gated_store_silu_any(fc_dtype t, void *out, const float *acc, const float *bias,
                                    const float *bias_up, ptrdiff_t n) {
    gated_store(FC_SILU, t, out, acc, bias, bias_up, n);
}
FC_INLINE void gated_store_gelu_any(fc_dtype t, void *out, const float *acc, const float *bias,
                                    const float *bias_up, ptrdiff_t n) {
    gated_store(FC_GELU, t, out, acc, bias, bias_up, n);
}
FC_INLINE void gated_store_gelu_tanh_any(fc_dtype t, void *out, const float *acc, const float *bias,
                                         const float *bias_up, ptrdiff_t n) {
    gated_store(FC_GELU_TANH, t, out, acc, bias, bias_up, n);
}
