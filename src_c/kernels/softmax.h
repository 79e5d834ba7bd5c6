/* out = exp(x - max(x)) / sum(exp(x - max(x)))
 * The exponentials are computed twice: a 16-bit out could not hold them between the passes. */

FC_INLINE void softmax_any(fc_dtype t, void *out, const void *x, ptrdiff_t n) {
    vf top = vf_set1(-INFINITY);
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf v = vf_get_upto(t, x, i, n);
        top = vf_max(top, i + FC_N <= n ? v : vf_fill_from(v, n - i, -INFINITY));
    }
    vf max = vf_set1(vf_hmax(top)), sum = vf_zero();
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf e = vf_exp(vf_get_upto(t, x, i, n) - max);
        sum += i + FC_N <= n ? e : vf_fill_from(e, n - i, 0.0f);
    }
    vf total = vf_set1(vf_sum(sum));
    for (ptrdiff_t i = 0; i < n; i += FC_N)
        vf_put_upto(t, out, i, vf_exp(vf_get_upto(t, x, i, n) - max) / total, n);
}
