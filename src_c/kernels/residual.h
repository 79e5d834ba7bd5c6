/* out[n] = x[n] + scale y[n], what a part of a layer adds to the residual stream; out may be x */
static void add_scaled(float *out, const float *x, const float *y, float scale, ptrdiff_t n) {
    const vf s = vf_set1(scale);
    for (ptrdiff_t i = 0; i < n; i += FC_N)
        vf_put_upto(FC_F32, out, i, vf_get_upto(FC_F32, x, i, n) + s * vf_get_upto(FC_F32, y, i, n), n);
}

/* h = x + residual, before a norm */
FC_INLINE void norm_residual(fc_dtype t, void *h, const void *x, const void *residual, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += FC_N)
        vf_put_upto(t, h, i, vf_get_upto(t, x, i, n) + vf_get_upto(t, residual, i, n), n);
}
