/* Pieces of attention that are not matrix products. */

/* 0 where True, -inf where False */
static void bias_from_bool(float *bias, const uint8_t *mask, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) bias[i] = mask[i] ? 0.0f : -INFINITY;
}

FC_INLINE vf attention_score(vf s, const float *bias, ptrdiff_t i, ptrdiff_t n, float softcap) {
    if (softcap > 0.0f) s = vf_set1(softcap) * vf_tanh(s / vf_set1(softcap));
    return bias ? s + vf_get_upto(FC_F32, bias, i, n) : s;
}

/* s[n]: score -> cap tanh(score / cap) + bias -> e^(score - max); max and the sum of what s now holds.
 * A row with nothing to see leaves zeros and sum 0; NaN scores stay NaN, and make the sum NaN. */
static void attention_row(float *s, const float *bias, ptrdiff_t n, float softcap, float *max, float *sum) {
    vf top = vf_set1(-INFINITY);
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf v = attention_score(vf_get_upto(FC_F32, s, i, n), bias, i, n, softcap);
        if (bias || softcap > 0.0f) vf_put_upto(FC_F32, s, i, v, n);
        top = vf_max(top, i + FC_N <= n ? v : vf_fill_from(v, n - i, -INFINITY));
    }
    float m = vf_hmax(top);
    vf shift = vf_set1(m == -INFINITY ? 0.0f : m), total = vf_zero();
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf e = vf_exp(vf_get_upto(FC_F32, s, i, n) - shift);
        vf_put_upto(FC_F32, s, i, e, n);
        total += i + FC_N <= n ? e : vf_fill_from(e, n - i, 0.0f);
    }
    *max = m;
    *sum = vf_sum(total);
}

/* (o, max, sum) <- its union with a chunk's (o_part, max_part, sum_part); an empty chunk changes nothing. */
static void attention_fold(float *o, float *max, float *sum, const float *o_part, float max_part, float sum_part,
                           ptrdiff_t n) {
    if (sum_part == 0.0f) return;
    float top = *sum == 0.0f || *max < max_part ? max_part : *max;
    float keep = *sum == 0.0f ? 0.0f : vf_exp(vf_set1(*max - top))[0], add = vf_exp(vf_set1(max_part - top))[0];
    vf vkeep = vf_set1(keep), vadd = vf_set1(add);
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf part = vf_get_upto(FC_F32, o_part, i, n) * vadd;
        vf_put_upto(FC_F32, o, i, *sum == 0.0f ? part : vf_fma(vf_get_upto(FC_F32, o, i, n), vkeep, part), n);
    }
    *sum = *sum * keep + sum_part * add;
    *max = top;
}

/* out = a * weight_a + b * weight_b, where a weight of 0 hides its side, NaN or not */
FC_INLINE void merge_any(fc_dtype t, void *out, const void *a, const void *b, float weight_a, float weight_b,
                         ptrdiff_t n) {
    vf wa = vf_set1(weight_a), wb = vf_set1(weight_b);
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf v = weight_a != 0.0f ? vf_get_upto(t, a, i, n) * wa : vf_zero();
        if (weight_b != 0.0f) v = vf_fma(vf_get_upto(t, b, i, n), wb, v);
        vf_put_upto(t, out, i, v, n);
    }
}
