/* One head at one position: pair (a, b) turns by its angle.     arXiv 2104.09864
 *   y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin
 * half-split pairs are (i, i + half), interleaved ones (2i, 2i + 1); channels from 2*half on are copied.
 * out may be x: each pair is read whole before it is written. */

FC_INLINE void rope_copy_tail(fc_dtype t, void *out, const void *x, ptrdiff_t from, ptrdiff_t dim) {
    if (out != x)
        for (ptrdiff_t i = from; i < dim; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(t, x, i, dim), dim);
}

FC_INLINE void rope_half_any(fc_dtype t, void *out, const void *x, const float *cos, const float *sin, ptrdiff_t half,
                             ptrdiff_t dim) {
    for (ptrdiff_t i = 0; i < half; i += FC_N) {
        ptrdiff_t n = half - i < FC_N ? half - i : FC_N;
        vf a = vf_get_upto(t, x, i, half), b = vf_get_upto(t, x, half + i, half + i + n);
        vf c = vf_get_upto(FC_F32, cos, i, half), s = vf_get_upto(FC_F32, sin, i, half);
        vf_put_upto(t, out, i, vf_fma(a, c, -(b * s)), half);
        vf_put_upto(t, out, half + i, vf_fma(b, c, a * s), half + i + n);
    }
    rope_copy_tail(t, out, x, 2 * half, dim);
}

FC_INLINE void rope_interleaved_any(fc_dtype t, void *out, const void *x, const float *cos, const float *sin,
                                    ptrdiff_t half, ptrdiff_t dim) {
    vf sign;
    for (int j = 0; j < FC_N; j++) sign[j] = j % 2 ? 1.0f : -1.0f;
    ptrdiff_t i = 0;
    for (; i + FC_N <= 2 * half; i += FC_N) {
        vf v = vf_get(t, x, i);
        vf_put(t, out, i, vf_fma(v, vf_dup(cos + i / 2), vf_swap(v) * (vf_dup(sin + i / 2) * sign)));
    }
    if (i < 2 * half) {
        float c[FC_N / 2] = {0}, s[FC_N / 2] = {0};
        memcpy(c, cos + i / 2, (size_t)(half - i / 2) * 4);
        memcpy(s, sin + i / 2, (size_t)(half - i / 2) * 4);
        vf v = vf_get_n(t, x, i, 2 * half - i);
        vf_put_n(t, out, i, vf_fma(v, vf_dup(c), vf_swap(v) * (vf_dup(s) * sign)), 2 * half - i);
    }
    rope_copy_tail(t, out, x, 2 * half, dim);
}
