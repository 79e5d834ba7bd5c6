/* h = x + residual;  out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias     arXiv 1607.06450
 * Two passes over a row that is in cache: the variance is of (h - mean), never E[h^2] - mean^2. */

FC_INLINE float layer_norm_sum(fc_dtype t, void *h, const void *x, const void *residual, ptrdiff_t n) {
    vf acc[4] = {0}, a, b;
    ptrdiff_t i = 0;
    if (t == FC_BF16 && residual) {
        norm_residual(t, h, x, residual, n);
        x = h, residual = NULL;
    }
    for (; t == FC_BF16 && i + 4 * FC_N <= n; i += 4 * FC_N)
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
            vf_get_pair(t, x, i + j * FC_N, &a, &b);
            acc[j] += a, acc[j + 1] += b;
        }
    for (; t != FC_BF16 && i + 4 * FC_N <= n; i += 4 * FC_N)
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
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
            vf a, b;
            vf_get_pair(t, h, i + j * FC_N, &a, &b);
            a -= m, b -= m;
            acc[j] = vf_fma(a, a, acc[j]), acc[j + 1] = vf_fma(b, b, acc[j + 1]);
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

struct layer_norm_scale {
    vf first, mean, scale;
    int wide;                   /* first is not 1 */
    const float *weight, *bias; /* (n) or NULL */
};

/* (x first - mean) scale weight + bias at i, as far as n reaches */
FC_INLINE vf layer_norm_scaled(fc_dtype t, const struct layer_norm_scale *s, const void *x, ptrdiff_t i, ptrdiff_t n) {
    const vf h = vf_get_upto(t, x, i, n), y = ((s->wide || FC_BYTES < 64 ? h * s->first : h) - s->mean) * s->scale;
    const vf weight = s->weight ? vf_get_upto(FC_F32, s->weight, i, n) : vf_set1(1.0f);
    if (s->bias) return vf_fma(y, weight, vf_get_upto(FC_F32, s->bias, i, n));
    return s->weight ? y * weight : y;
}

/* out[n]. Vectors are stored where they are aligned: the others cost twice as much. */
FC_INLINE void layer_norm_scale(fc_dtype t, void *out, const void *x, const float *weight, const float *bias,
                                ptrdiff_t n, float pre, float mean, float inv) {
    const struct layer_norm_scale s = {vf_set1(pre), vf_set1(mean), vf_set1(inv), pre != 1.0f, weight, bias};
    ptrdiff_t i = vf_floats_to_aligned(t, out, n);
    if (i) vf_put_n(t, out, 0, layer_norm_scaled(t, &s, x, 0, i), i);
    for (; i + 2 * FC_N <= n; i += 2 * FC_N)
        vf_put2(t, out, i, layer_norm_scaled(t, &s, x, i, n), layer_norm_scaled(t, &s, x, i + FC_N, n));
    for (; i < n; i += FC_N) vf_put_upto(t, out, i, layer_norm_scaled(t, &s, x, i, n), n);
}

FC_INLINE void layer_norm_any(fc_dtype t, void *out, void *h, const void *x, const void *residual, const float *weight,
                              const float *bias, ptrdiff_t n, float eps, const void *next, struct fc_stream *stream) {
    float mean = layer_norm_sum(t, h, x, residual, n) / (float)n, pre = 1.0f, inv;
    const char *row = residual ? h : x;
    float sum = layer_norm_sum_squares(t, row, mean, n);
    if (sum < 3e38f && sum + eps * (float)n > 1e-25f) inv = 1.0f / sqrtf(sum / (float)n + eps);
    else inv = layer_norm_wide(t, row, n, eps, &mean, &pre);
    const ptrdiff_t size = fc_size_of(t), step = next ? STREAM_BYTES / size : n;
    char some[STREAM_BYTES] __attribute__((aligned(FC_BYTES)));
    for (ptrdiff_t i = 0, count; i < n; i += count) {
        char *to = (char *)out + i * size;
        count = stream ? stream_count(to, n - i, size) : n - i < step ? n - i : step;
        layer_norm_scale(t, stream ? some : to, row + i * size, weight ? weight + i : NULL, bias ? bias + i : NULL,
                         count, pre, mean, inv);
        stream_part(stream, to, stream ? some : to, count * size, next ? (const char *)next + i * size : NULL);
    }
}
