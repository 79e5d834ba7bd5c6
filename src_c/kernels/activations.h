/* relu(x) = max(x, 0)                      silu(x) = x / (1 + e^-x)                arXiv 1702.03118
 * gelu(x) = x Phi(x)                       gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
 *         (which is 0.5 x (1 + tanh(..)) without its cancellation)                 arXiv 1606.08415
 * and the gated forms f(gated) * linear: reglu, swiglu, geglu, geglu_tanh          arXiv 2002.05202 */

FC_INLINE vf vf_activate(fc_activation f, vf x) {
    if (f == FC_RELU) return vf_max(vf_zero(), x);
    if (f == FC_SILU) return vf_times_sigmoid(x, x);
    if (f == FC_GELU) return x * vf_normal_cdf(x);
    return vf_times_sigmoid(x, x * vf_fma(x * x, vf_set1(0.0713548163f), vf_set1(1.59576912f)));
}

/* f(x), or f(x) * linear */
FC_INLINE vf activated(fc_activation f, fc_dtype t, const void *x, const void *linear, ptrdiff_t i, ptrdiff_t n) {
    vf a = vf_activate(f, vf_get_upto(t, x, i, n));
    return linear ? a * vf_get_upto(t, linear, i, n) : a;
}

/* Elements [i, end) of n */
FC_INLINE void activate_part(fc_activation f, fc_dtype t, void *out, const void *x, const void *linear, ptrdiff_t i,
                             ptrdiff_t end) {
    for (; i < end; i += FC_N) vf_put_upto(t, out, i, activated(f, t, x, linear, i, end), end);
}

enum { ASK_AHEAD = 2048 };

FC_INLINE void activate_row(fc_activation f, fc_dtype t, void *out, const void *x, const void *linear, ptrdiff_t n, int past) {
    ptrdiff_t i = vf_head(t, out, n, past);
    activate_part(f, t, out, x, linear, 0, i);
    for (; i + 2 * FC_N <= n; i += 2 * FC_N) {
        vf_ask(t, x, i, ASK_AHEAD, past);
        if (linear) vf_ask(t, linear, i, ASK_AHEAD, past);
        vf a = vf_activate(f, vf_get(t, x, i)), b = vf_activate(f, vf_get(t, x, i + FC_N));
        if (linear) a *= vf_get(t, linear, i), b *= vf_get(t, linear, i + FC_N);
        vf_put2(t, out, i, a, b, past);
    }
    activate_part(f, t, out, x, linear, i, n);
    if (past) vf_stream_end();
}

FC_INLINE void relu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, int past) { activate_row(FC_RELU, t, out, x, NULL, n, past); }
FC_INLINE void silu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, int past) { activate_row(FC_SILU, t, out, x, NULL, n, past); }
FC_INLINE void gelu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, int past) { activate_row(FC_GELU, t, out, x, NULL, n, past); }
FC_INLINE void gelu_tanh_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, int past) {
    activate_row(FC_GELU_TANH, t, out, x, NULL, n, past);
}

FC_INLINE void reglu_any(fc_dtype t, void *out, const void *gated, const void *linear, ptrdiff_t n, int past) {
    activate_row(FC_RELU, t, out, gated, linear, n, past);
}
FC_INLINE void swiglu_any(fc_dtype t, void *out, const void *gated, const void *linear, ptrdiff_t n, int past) {
    activate_row(FC_SILU, t, out, gated, linear, n, past);
}
FC_INLINE void geglu_any(fc_dtype t, void *out, const void *gated, const void *linear, ptrdiff_t n, int past) {
    activate_row(FC_GELU, t, out, gated, linear, n, past);
}
FC_INLINE void geglu_tanh_any(fc_dtype t, void *out, const void *gated, const void *linear, ptrdiff_t n, int past) {
    activate_row(FC_GELU_TANH, t, out, gated, linear, n, past);
}
