/* relu(x) = max(x, 0)                      silu(x) = x / (1 + e^-x)                arXiv 1702.03118
 * gelu(x) = x Phi(x)                       gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
 *         (which is 0.5 x (1 + tanh(..)) without its cancellation)                 arXiv 1606.08415
 * and the gated forms f(gate) * up: reglu, swiglu, geglu, geglu_tanh          arXiv 2002.05202 */

FC_INLINE vf vf_activate(fc_activation f, vf x) {
    if (f == FC_RELU) return vf_max(vf_zero(), x);
    if (f == FC_SILU) return vf_times_sigmoid(x, x);
    if (f == FC_GELU) return x * vf_normal_cdf(x);
    return vf_times_sigmoid(x, x * vf_fma(x * x, vf_set1(0.0713548163f), vf_set1(1.59576912f)));
}

FC_INLINE void activate_row(fc_activation f, fc_dtype t, void *out, const void *x, const void *up, ptrdiff_t n) {
    ptrdiff_t i = 0;
    for (; i + 2 * FC_N <= n; i += 2 * FC_N) {
        vf a = vf_activate(f, vf_get(t, x, i)), b = vf_activate(f, vf_get(t, x, i + FC_N));
        if (up) a *= vf_get(t, up, i), b *= vf_get(t, up, i + FC_N);
        vf_put2(t, out, i, a, b);
    }
    for (; i < n; i += FC_N) {
        vf a = vf_activate(f, vf_get_upto(t, x, i, n));
        vf_put_upto(t, out, i, up ? a * vf_get_upto(t, up, i, n) : a, n);
    }
}

FC_INLINE void relu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n) {
    activate_row(FC_RELU, t, out, x, NULL, n);
}
FC_INLINE void silu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n) {
    activate_row(FC_SILU, t, out, x, NULL, n);
}
FC_INLINE void gelu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n) {
    activate_row(FC_GELU, t, out, x, NULL, n);
}
FC_INLINE void gelu_tanh_any(fc_dtype t, void *out, const void *x, ptrdiff_t n) {
    activate_row(FC_GELU_TANH, t, out, x, NULL, n);
}

FC_INLINE void reglu_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n) {
    activate_row(FC_RELU, t, out, gate, up, n);
}
FC_INLINE void swiglu_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n) {
    activate_row(FC_SILU, t, out, gate, up, n);
}
FC_INLINE void geglu_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n) {
    activate_row(FC_GELU, t, out, gate, up, n);
}
FC_INLINE void geglu_tanh_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n) {
    activate_row(FC_GELU_TANH, t, out, gate, up, n);
}
