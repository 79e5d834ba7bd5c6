/* h = x + residual;  out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias     arXiv 1607.06450
 * Two passes over a row that is in cache: the variance is of (h - mean), never E[h^2] - mean^2. */

FC_INLINE float layer_norm_sum(fc_dtype t, void *h, const void *x, const void *residual, ptrdiff_t n) {
    vf acc[4] = {0};
    ptrdiff_t i = 0;
    for (; i + 4 * FC_N <= n; i += 4 * FC_N)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf v = vf_get(t, x, i + j * FC_N);
            if (residual) {
                vf_put(t, h, i + j * FC_N, v + vf_get(t, residual, i + j * FC_N));
                v = vf_get(t, h, i + j * FC_N);
            }
            acc[j] += v;
        }
    for (; i < n; i += FC_N) {
        vf v = vf_get_upto(t, x, i, n);
        if (residual) {
            vf_put_upto(t, h, i, v + vf_get_upto(t, residual, i, n), n);
            v = vf_get_upto(t, h, i, n);
        }
        acc[0] += v;
    }
    return vf_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

FC_INLINE float layer_norm_sum_squares(fc_dtype t, const void *h, float mean, ptrdiff_t n) {
    vf acc[4] = {0}, m = vf_set1(mean);
    ptrdiff_t i = 0;
    for (; i + 4 * FC_N <= n; i += 4 * FC_N)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf v = vf_get(t, h, i + j * FC_N) - m;
            acc[j] = vf_fma(v, v, acc[j]);
        }
    for (; i + FC_N <= n; i += FC_N) {
        vf v = vf_get(t, h, i) - m;
        acc[0] = vf_fma(v, v, acc[0]);
    }
    if (i < n) {
        vf v = vf_fill_from(vf_get_n(t, h, i, n - i) - m, n - i, 0.0f);
        acc[0] = vf_fma(v, v, acc[0]);
    }
    return vf_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

/* The rare row whose sums leave float32's range: everything in double; 1/sqrt(var + eps) as pre * inv. */
static __attribute__((noinline, unused)) float layer_norm_wide(fc_dtype t, const void *h, ptrdiff_t n, float eps,
                                                               float *mean, float *pre) {
    double sum = 0, squares = 0;
    for (int pass = 0; pass < 2; pass++)
        for (ptrdiff_t i = 0; i < n; i += FC_N) {
            float lane[FC_N];
            vf_store(lane, t == FC_F32   ? vf_get_upto(FC_F32, h, i, n)
                           : t == FC_F16 ? vf_get_upto(FC_F16, h, i, n)
                                         : vf_get_upto(FC_BF16, h, i, n));
            for (int j = 0; j < FC_N && i + j < n; j++) {
                double centred = lane[j] - sum / (double)n;
                if (pass) squares += centred * centred;
                else squares += lane[j];
            }
            if (!pass && i + FC_N >= n) sum = squares, squares = 0;
        }
    double inv = 1.0 / sqrt(squares / (double)n + eps);
    *pre = inv < 1e-30 ? 0x1p-64f : inv > 1e30 ? 0x1p64f : 1.0f;
    *mean = (float)(sum / (double)n * *pre);
    return (float)(inv / *pre);
}

FC_INLINE vf layer_norm_scaled(fc_dtype t, const void *x, ptrdiff_t i, ptrdiff_t n, vf first, vf mean, vf scale,
                               const float *weight, const float *bias) {
    vf v = (vf_get_upto(t, x, i, n) * first - mean) * scale;
    if (weight) v *= vf_get_upto(FC_F32, weight, i, n);
    return bias ? v + vf_get_upto(FC_F32, bias, i, n) : v;
}

FC_INLINE void layer_norm_any(fc_dtype t, void *out, void *h, const void *x, const void *residual, const float *weight,
                              const float *bias, ptrdiff_t n, float eps, int past) {
    float mean = layer_norm_sum(t, h, x, residual, n) / (float)n, pre = 1.0f, inv;
    if (residual) x = h;
    float sum = layer_norm_sum_squares(t, x, mean, n);
    if (sum < 3e38f && sum + eps * (float)n > 1e-25f) inv = 1.0f / sqrtf(sum / (float)n + eps);
    else inv = layer_norm_wide(t, x, n, eps, &mean, &pre);
    vf m = vf_set1(mean), scale = vf_set1(inv), first = vf_set1(pre);
    const ptrdiff_t head = vf_head(t, out, n, past);
    ptrdiff_t i = 0;
    for (; i < head; i += FC_N) vf_put_upto(t, out, i, layer_norm_scaled(t, x, i, head, first, m, scale, weight, bias), head);
    for (i = head; i + 2 * FC_N <= n; i += 2 * FC_N) {
        vf_ask(t, x, i, n * (t == FC_F32 ? 4 : 2), past);
        vf_put2(t, out, i, layer_norm_scaled(t, x, i, n, first, m, scale, weight, bias),
                layer_norm_scaled(t, x, i + FC_N, n, first, m, scale, weight, bias), past);
    }
    for (; i < n; i += FC_N) vf_put_upto(t, out, i, layer_norm_scaled(t, x, i, n, first, m, scale, weight, bias), n);
    if (past) vf_stream_end();
}
