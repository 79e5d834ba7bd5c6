/* out = e / sum(e),  e = exp(x - max(x)), which stay in float32 between the passes: e[n], or out itself where it is that
 * and need not go past the caches. */

FC_INLINE void softmax_any(fc_dtype t, void *out, const void *x, float *e, ptrdiff_t n, int past) {
    vf top = vf_set1(-INFINITY), sum = vf_zero();
    ptrdiff_t i = 0;
    for (; i + FC_N <= n; i += FC_N) top = vf_max(top, vf_get(t, x, i));
    if (i < n) top = vf_max(top, vf_fill_from(vf_get_n(t, x, i, n - i), n - i, -INFINITY));
    const vf max = vf_set1(vf_hmax(top));
    for (i = 0; i + FC_N <= n; i += FC_N) {
        vf v = vf_exp_negative(vf_get(t, x, i) - max);
        sum += v;
        vf_store(e + i, v);
    }
    if (i < n) {
        vf v = vf_fill_from(vf_exp_negative(vf_get_n(t, x, i, n - i) - max), n - i, 0.0f);
        sum += v;
        vf_store_n(e + i, v, n - i);
    }
    const vf share = vf_set1(1.0f / vf_sum(sum));
    const ptrdiff_t head = vf_head(t, out, n, past);
    for (i = 0; i < head; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(FC_F32, e, i, head) * share, head);
    for (i = head; i + 2 * FC_N <= n; i += 2 * FC_N) {
        vf_ask(t, x, i, n * (t == FC_F32 ? 4 : 2), past);
        vf_put2(t, out, i, vf_load(e + i) * share, vf_load(e + i + FC_N) * share, past);
    }
    for (; i < n; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(FC_F32, e, i, n) * share, n);
    if (past) vf_stream_end();
}
