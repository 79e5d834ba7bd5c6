/* One head at one position: pair (a, b) rotates by its angle.     arXiv 2104.09864
 *   y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin
 * split-half pairs are (i, i + pairs), interleaved ones (2i, 2i + 1); channels from 2 pairs on are copied.
 * out may be x: each pair is read whole before it is written. */

/* Two at a time go on when there are so many: of vectors of 64 bytes, whose stores past the caches wait longest, they
 * have by then reached the first cache, behind what was stored before them. */
enum { FC_STAGED_HEADS = FC_BYTES == 64 ? 16 : 1 };

FC_INLINE void rope_copy_tail(fc_dtype t, void *out, const void *x, ptrdiff_t from, ptrdiff_t dim) {
    if (out != x)
        for (ptrdiff_t i = from; i < dim; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(t, x, i, dim), dim);
}

FC_INLINE void rope_split_halves_any(fc_dtype t, void *out, const void *x, const float *cos, const float *sin,
                                     ptrdiff_t pairs, ptrdiff_t dim) {
    ptrdiff_t i = 0;
    for (; i + 2 * FC_N <= pairs; i += 2 * FC_N) {
        vf y[2], z[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const ptrdiff_t at = i + j * FC_N;
            vf a = vf_get(t, x, at), b = vf_get(t, x, pairs + at), c = vf_load(cos + at), s = vf_load(sin + at);
            y[j] = vf_fma(a, c, -(b * s));
            z[j] = vf_fma(b, c, a * s);
        }
        vf_put2(t, out, i, y[0], y[1]);
        vf_put2(t, out, pairs + i, z[0], z[1]);
    }
    for (; i < pairs; i += FC_N) {
        ptrdiff_t n = pairs - i < FC_N ? pairs - i : FC_N;
        vf a = vf_get_upto(t, x, i, pairs), b = vf_get_upto(t, x, pairs + i, pairs + i + n);
        vf c = vf_get_upto(FC_F32, cos, i, pairs), s = vf_get_upto(FC_F32, sin, i, pairs);
        vf_put_upto(t, out, i, vf_fma(a, c, -(b * s)), pairs);
        vf_put_upto(t, out, pairs + i, vf_fma(b, c, a * s), pairs + i + n);
    }
    rope_copy_tail(t, out, x, 2 * pairs, dim);
}

FC_INLINE void rope_interleaved_any(fc_dtype t, void *out, const void *x, const float *cos, const float *sin,
                                    ptrdiff_t pairs, ptrdiff_t dim) {
    vf sign;
    for (int j = 0; j < FC_N; j++) sign[j] = j % 2 ? 1.0f : -1.0f;
    ptrdiff_t i = 0;
    for (; i + FC_N <= 2 * pairs; i += FC_N) {
        vf v = vf_get(t, x, i);
        vf_put(t, out, i, vf_fma(v, vf_dup(cos + i / 2), vf_swap(v) * (vf_dup(sin + i / 2) * sign)));
    }
    if (i < 2 * pairs) {
        float c[FC_N / 2] = {0}, s[FC_N / 2] = {0};
        memcpy(c, cos + i / 2, (size_t)(pairs - i / 2) * 4);
        memcpy(s, sin + i / 2, (size_t)(pairs - i / 2) * 4);
        vf v = vf_get_n(t, x, i, 2 * pairs - i);
        vf_put_n(t, out, i, vf_fma(v, vf_dup(c), vf_swap(v) * (vf_dup(s) * sign)), 2 * pairs - i);
    }
    rope_copy_tail(t, out, x, 2 * pairs, dim);
}
