/* A row of activations for integer weights:  x[k] ~ scale q[k],  scale = max|x| / 127,  q in -127..127, round to
 * nearest even; sums[g] = -offset * sum of q over each group of k as int32, or with offset 0 the sum as float32, which
 * holds it exactly (a group has at most 2^16 values). q is int8, or, `wide`, int16 with each four in the order
 * 0 2 1 3 (see gemm.h). q and sums are zero from n to `padded`. A row with a NaN or an infinity gets the scale NaN; one
 * with nothing above 2^-100 counts as zero, so that 127 / max|x| is an ordinary number. */

FC_INLINE void quantize_scale_any(fc_dtype t, float *scale, float *inverse, const void *x, ptrdiff_t n) {
    vf top = vf_zero(), poison = vf_zero();
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf v = vf_get_upto(t, x, i, n);
        top = vf_max(vf_abs(v), top);
        poison += v * 0.0f;
    }
    const float most = vf_hmax(top), nan = vf_sum(poison);
    const int usable = nan == 0.0f && most > 0x1p-100f;
    *inverse = usable ? 127.0f / most : 0.0f;
    *scale = nan != 0.0f ? nan : usable ? most / 127.0f : 0.0f;
}

/* Part of a row, from a group's first value on, with the row's inverse scale. */
FC_INLINE void quantize_any(fc_dtype t, void *q, void *sums, const void *x, float inverse, ptrdiff_t n, ptrdiff_t padded,
                            ptrdiff_t group, int wide, int offset) {
    const vf factor = vf_set1(inverse), magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    char *to = sums;
    for (ptrdiff_t from = 0; from < padded; from += group, to += 4) {
        vi sum = {0};
        for (ptrdiff_t i = from; i < from + group; i += FC_N) {
            vi v = {0};
            if (i < n && inverse > 0.0f) v = (vi)(vf_get_upto(t, x, i, n) * factor + magic) - 0x4b400000;
            sum += v;
            if (wide) vi_put16((int16_t *)q + i, vi_order_0213(v));
            else vi_put8((int8_t *)q + i, v);
        }
        const int32_t total = vi_sum(sum), start = -offset * total;
        const float as_float = (float)total;
        memcpy(to, offset ? (const void *)&start : (const void *)&as_float, 4);
    }
}
