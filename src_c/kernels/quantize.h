/* Activations for integer weights, a row of x in chunks of k, see fc_rounding:
 *     x[k] ~ scale q[k]     scale = max|x| / qmax of the chunk,  q in -qmax..qmax, round to nearest even
 * A chunk's integer sums are exact, whatever multiplies it, so it ends where a scale of W does. q is int8; int8 in two
 * planes, q = 128 h + l with l in 0..127; or, `wide`, int16. q and sums are zero from n to `padded`.
 * A chunk with a NaN or an infinity gets the scale NaN; one with nothing above 2^-100 counts as zero, so that
 * qmax / max|x| is an ordinary number. */

/* scale and its inverse, of values whose largest magnitude is `largest`; poison: NaN if there is a NaN or an
 * infinity */
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

/* The chunks at a time: so many that each lane of a vector belongs to one of them. Their maxima, and the sums of their
 * integers, meet in a vector by way of a square of registers. */

/* r[j] of chunk j, whose lanes are to be added: lane j of the result */
FC_INLINE vi vi_sums_of_rows(vi r[FC_N]) {
    vf square[FC_N];
    vi sum = {0};
    memcpy(square, r, sizeof square);
    vf_transpose(square);
#pragma GCC unroll 16
    for (int j = 0; j < FC_N; j++) sum += (vi)square[j];
    return sum;
}

FC_INLINE vf vf_maxima_of_rows(vf r[FC_N]) {
    vf top = vf_zero();
    vf_transpose(r);
#pragma GCC unroll 16
    for (int j = 0; j < FC_N; j++) top = vf_max(r[j], top);
    return top;
}

/* Scales and inverses (FC_N) of `count` chunks of x from `from` on. */
FC_INLINE void chunk_scales(fc_dtype t, float *scale, float *inverse, const void *x, ptrdiff_t from, ptrdiff_t n,
                            ptrdiff_t chunk, int count, float qmax) {
    vf top[FC_N] = {0}, poison = vf_zero();
    for (int j = 0; j < count; j++) {
        vf largest = vf_zero();
        for (ptrdiff_t i = from + j * chunk; i < from + (j + 1) * chunk && i < n; i += FC_N) {
            vf v = vf_get_upto(t, x, i, n);
            largest = vf_max(vf_abs(v), largest);
            poison += v * 0.0f;
        }
        top[j] = largest;
    }
    const vf largest = vf_maxima_of_rows(top), least = vf_set1(0x1p-100f), steps = vf_set1(qmax);
    vf_store(scale, vf_if_lt(least, largest, largest / steps, vf_zero()));
    vf_store(inverse, vf_if_lt(least, largest, steps / largest, vf_zero()));
    if (vf_sum(poison) == 0.0f) return;
    for (int j = 0; j < count; j++, from += chunk) {
        const ptrdiff_t left = n - from < chunk ? n - from : chunk;
        quantize_scale_any(t, scale + j, inverse + j, (const char *)x + from * (t == FC_F32 ? 4 : 2), left, qmax);
    }
}

/* A chunk of q, and in each lane a part of its sum. x[i] for i >= n counts as zero. */
FC_INLINE vi quantize_chunk(fc_dtype t, const int wide, const int planes, char *q, const void *x, ptrdiff_t from,
                            ptrdiff_t n, ptrdiff_t chunk, float inverse) {
    const vf factor = vf_set1(inverse), magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vi sum = {0};
    if (inverse == 0.0f) n = 0; /* whatever x is */
    for (ptrdiff_t i = 0; i < chunk; i += FC_N) {
        vi v = {0};
        if (from + i < n) v = (vi)(vf_get_upto(t, x, from + i, n) * factor + magic) - 0x4b400000;
        sum += v;
        if (wide) vi_put16((int16_t *)(void *)q + i, vi_order_0213(v));
        else if (planes == 1) vi_put8((int8_t *)q + i, v);
        else {
            vi_put8((int8_t *)q + i, v >> 7);
            vi_put8((int8_t *)q + chunk + i, v & 127);
        }
    }
    return sum;
}

FC_INLINE void put_chunk(char *to, struct fc_chunk chunk) { memcpy(to, &chunk, sizeof chunk); }

FC_INLINE void quantize_as(fc_dtype t, const int wide, const int planes, char *q, const void *x, ptrdiff_t n,
                           ptrdiff_t padded, const struct fc_rounding *r) {
    const ptrdiff_t chunk = r->chunk, group_chunks = r->group / chunk, q_bytes = chunk * (wide ? 2 : planes);
    const ptrdiff_t step = fc_chunk_bytes(q_bytes, FC_X_ALIGN);
    ptrdiff_t of_group = 0;
    float scale[FC_N], inverse[FC_N], whole = 0.0f;
    int32_t sum[FC_N];
    char *first = q; /* what follows the q of a group's first chunk */
    for (ptrdiff_t from = 0; from < padded; from += FC_N * chunk) {
        const int count = (int)(padded - from < FC_N * chunk ? (padded - from) / chunk : FC_N);
        vi sums[FC_N] = {0};
        chunk_scales(t, scale, inverse, x, from, n, chunk, count, r->qmax);
        for (int j = 0; j < count; j++)
            sums[j] = quantize_chunk(t, wide, planes, q + j * step, x,
                                     from + j * chunk, n, chunk, inverse[j]);
        if (count == 1) sum[0] = vi_sum(sums[0]);
        else vf_store(sum, (vf)vi_sums_of_rows(sums));
        for (int j = 0; j < count; j++, q += step) {
            if (of_group == 0) first = q + q_bytes, whole = 0.0f;
            if (++of_group == group_chunks) of_group = 0;
            whole += (float)sum[j] * scale[j];
            put_chunk(q + q_bytes, (struct fc_chunk){.scale = scale[j], .start = -r->zero * sum[j]});
            memcpy(first + offsetof(struct fc_chunk, sum), &whole, 4);
        }
    }
}

/* Part of a row, from a group's first value on */
FC_INLINE void quantize_any(fc_dtype t, void *q, const void *x, ptrdiff_t n, ptrdiff_t padded,
                            const struct fc_rounding *r) {
    if (r->wide) quantize_as(t, 1, 1, q, x, n, padded, r);
    else if (r->planes == 1) quantize_as(t, 0, 1, q, x, n, padded, r);
    else quantize_as(t, 0, 2, q, x, n, padded, r);
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
