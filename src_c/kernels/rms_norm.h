/* h = x + residual;  out = h / sqrt(mean(h^2) + eps) * (offset + weight)     arXiv 1910.07467
 * h is rounded to its dtype before it is normalised, so the fused form equals the two calls. */

/* Sum of h^2 over a row, writing h on the way, which of bfloat16 comes first: a sum takes it apart at even and odd
 * places. Eight chains hide the latency; the tree depends on n alone. */
FC_INLINE float rms_sum_squares(fc_dtype t, void *h, const void *x, const void *residual, ptrdiff_t n) {
    vf acc[8] = {0};
    ptrdiff_t i = 0;
    if (t == FC_BF16 && residual) {
        norm_residual(t, h, x, residual, n);
        x = h, residual = NULL;
    }
    for (; t == FC_BF16 && i + 8 * FC_N <= n; i += 8 * FC_N)
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2) {
            vf a, b;
            vf_get_pair(t, x, i + j * FC_N, &a, &b);
            acc[j] = vf_fma(a, a, acc[j]), acc[j + 1] = vf_fma(b, b, acc[j + 1]);
        }
    for (; t != FC_BF16 && i + 8 * FC_N <= n; i += 8 * FC_N)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            vf v = vf_get(t, x, i + j * FC_N);
            if (residual) {
                vf_put(t, h, i + j * FC_N, v + vf_get(t, residual, i + j * FC_N));
                v = vf_get(t, h, i + j * FC_N);
            }
            acc[j] = vf_fma(v, v, acc[j]);
        }
    for (; i < n; i += FC_N) {
        vf v = vf_get_upto(t, x, i, n);
        if (residual) {
            vf_put_upto(t, h, i, v + vf_get_upto(t, residual, i, n), n);
            v = vf_get_upto(t, h, i, n);
        }
        acc[0] = vf_fma(v, v, acc[0]);
    }
    return vf_sum(((acc[0] + acc[1]) + (acc[2] + acc[3])) + ((acc[4] + acc[5]) + (acc[6] + acc[7])));
}

/* The rare row whose squares leave float32's range: 1/sqrt(mean + eps) as pre * inv, both normal floats. */
static __attribute__((noinline, unused)) float rms_wide_inverse(fc_dtype t, const void *h, ptrdiff_t n, float eps,
                                                                float *pre) {
    double sum = 0;
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        float lane[FC_N];
        vf_store(lane, t == FC_F32   ? vf_get_upto(FC_F32, h, i, n)
                       : t == FC_F16 ? vf_get_upto(FC_F16, h, i, n)
                                     : vf_get_upto(FC_BF16, h, i, n));
        for (int j = 0; j < FC_N; j++) sum += (double)lane[j] * lane[j];
    }
    double inv = 1.0 / sqrt(sum / (double)n + eps);
    *pre = inv < 1e-30 ? 0x1p-64f : inv > 1e30 ? 0x1p64f : 1.0f;
    return (float)(inv / *pre);
}

struct rms_scale {
    vf first, scale, plus;
    int wide; /* first is not 1 */
};

/* x first scale (plus + weight) at i, as far as n reaches */
FC_INLINE vf rms_scaled(fc_dtype t, const struct rms_scale *s, const void *x, const float *weight, ptrdiff_t i,
                        ptrdiff_t n) {
    const vf h = vf_get_upto(t, x, i, n), y = (s->wide || FC_BYTES < 64 ? h * s->first : h) * s->scale;
    return weight ? y * (s->plus + vf_get_upto(FC_F32, weight, i, n)) : y;
}

/* out[n]. Vectors are stored where they are aligned: the others cost twice as much. */
FC_INLINE void rms_scale(fc_dtype t, void *out, const void *x, const float *weight, ptrdiff_t n, float pre, float inv,
                         float offset) {
    const struct rms_scale s = {vf_set1(pre), vf_set1(inv), vf_set1(offset), pre != 1.0f};
    ptrdiff_t i = vf_floats_to_aligned(t, out, n);
    if (i) vf_put_n(t, out, 0, rms_scaled(t, &s, x, weight, 0, i), i);
    for (; i + 2 * FC_N <= n; i += 2 * FC_N)
        vf_put2(t, out, i, rms_scaled(t, &s, x, weight, i, n), rms_scaled(t, &s, x, weight, i + FC_N, n));
    for (; i < n; i += FC_N) vf_put_upto(t, out, i, rms_scaled(t, &s, x, weight, i, n), n);
}

FC_INLINE void rms_norm_any(fc_dtype t, void *out, void *h, const void *x, const void *residual, const float *weight,
                            ptrdiff_t n, float eps, float offset, const void *next, struct fc_stream *stream) {
    float sum = rms_sum_squares(t, h, x, residual, n), pre = 1.0f, inv;
    const char *row = residual ? h : x;
    if (sum < 3e38f && sum + eps * (float)n > 1e-25f) inv = 1.0f / sqrtf(sum / (float)n + eps);
    else inv = rms_wide_inverse(t, row, n, eps, &pre);
    const ptrdiff_t size = fc_size_of(t), step = next ? STREAM_BYTES / size : n;
    char some[STREAM_BYTES] __attribute__((aligned(FC_BYTES)));
    for (ptrdiff_t i = 0, count; i < n; i += count) {
        char *to = (char *)out + i * size;
        count = stream ? stream_count(to, n - i, size) : n - i < step ? n - i : step;
        rms_scale(t, stream ? some : to, row + i * size, weight ? weight + i : NULL, count, pre, inv, offset);
        stream_part(stream, to, stream ? some : to, count * size, next ? (const char *)next + i * size : NULL);
    }
}
