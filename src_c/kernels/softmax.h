/* out = e / sum(e),  e = exp(x - max(x)), which stay in float32 between the passes: e[n], or out itself where it is
 * that and need not go past the caches. */

/* out[n] = e share */
FC_INLINE void softmax_scale(fc_dtype t, void *out, const float *e, ptrdiff_t n, vf share) {
    ptrdiff_t i = 0;
    for (; i + 2 * FC_N <= n; i += 2 * FC_N) vf_put2(t, out, i, vf_load(e + i) * share, vf_load(e + i + FC_N) * share);
    for (; i < n; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(FC_F32, e, i, n) * share, n);
}

FC_INLINE void softmax_any(fc_dtype t, void *out, const void *x, float *e, ptrdiff_t n, const void *next,
                           struct fc_stream *stream) {
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
    const ptrdiff_t size = fc_size_of(t), step = stream || next ? STREAM_BYTES / size : n;
    char some[STREAM_BYTES];
    for (i = 0; i < n; i += step) {
        const ptrdiff_t count = n - i < step ? n - i : step;
        char *to = (char *)out + i * size;
        softmax_scale(t, stream ? some : to, e + i, count, share);
        stream_part(stream, to, stream ? some : to, count * size, next ? (const char *)next + i * size : NULL);
    }
}
