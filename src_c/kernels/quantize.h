/* A row of activations for integer weights:  x[k] ~ scale q[k],  scale = max|x| / 127,  q in -127..127, round to
 * nearest even; sums[g] = -offset * sum of q over each group of k as int32, or with offset 0 the sum as float32, which
 * holds it exactly (a group has at most 2^16 values). q is int8, or, `wide`, int16 with each four in the order
 * 0 2 1 3 (see gemm.h). q and sums are zero from n to `padded`. A row with a NaN or an infinity gets the scale NaN; one
 * with nothing above 2^-100 counts as zero, so that 127 / max|x| is an ordinary number. qmax: 127, or what else q may
 * be. */

/* scale and its inverse, of a row whose largest magnitude is `largest`; poison: NaN if the row has a NaN or an infinity
 */
FC_INLINE void quantize_scales(float *scale, float *inverse, float largest, float poison, float qmax) {
    const int usable = poison == 0.0f && largest > 0x1p-100f;
    *inverse = usable ? qmax / largest : 0.0f;
    *scale = poison != 0.0f ? poison : usable ? largest / qmax : 0.0f;
}

FC_INLINE void quantize_scale_any(fc_dtype t, float *scale, float *inverse, const void *x, ptrdiff_t n, float qmax) {
    vf top = vf_zero(), poison = vf_zero();
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf v = vf_get_upto(t, x, i, n);
        top = vf_max(vf_abs(v), top);
        poison += v * 0.0f;
    }
    quantize_scales(scale, inverse, vf_hmax(top), vf_sum(poison), qmax);
}

/* Part of a row, from a group's first value on, with the row's inverse scale. */
FC_INLINE void quantize_any(fc_dtype t, void *q, void *sums, const void *x, float inverse, ptrdiff_t n,
                            ptrdiff_t padded, ptrdiff_t group, int wide, int offset) {
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

/* q[n] = x[n] inverse as int16, to nearest even; q may begin where x does. inverse 0: zeros, whatever x is */
FC_INLINE void put_s16(int16_t *q, const float *x, ptrdiff_t n, float inverse) {
    const vf factor = vf_set1(inverse), magic = vf_set1(12582912.0f);
    ptrdiff_t i = 0;
    if (inverse == 0.0f) memset(q, 0, (size_t)n * 2);
    else {
        for (; i + FC_N <= n; i += FC_N) vi_put16(q + i, (vi)vf_fma(vf_load(x + i), factor, magic) - 0x4b400000);
        if (i < n) {
            int16_t part[FC_N];
            vi_put16(part, (vi)vf_fma(vf_load_n(x + i, n - i), factor, magic) - 0x4b400000);
            memcpy(q + i, part, (size_t)(n - i) * 2);
        }
    }
}

/* x[n] ~ scale q[n], q int16 in -qmax..qmax as above */
static void to_s16(int16_t *q, float *scale, const float *x, ptrdiff_t n, float qmax) {
    float inverse;
    quantize_scale_any(FC_F32, scale, &inverse, x, n, qmax);
    put_s16(q, x, n, inverse);
}
