/* Pieces of attention that are not matrix products. */

/* 0 where True, -inf where False */
static void bias_from_bool(float *bias, const uint8_t *mask, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) bias[i] = mask[i] ? 0.0f : -INFINITY;
}

/* s where bias > -inf or NaN, else `hidden`: a mask's -inf hides a key whatever its score is, infinite or NaN too */
FC_INLINE vf unless_hidden(vf bias, vf s, vf hidden) {
    const vu is = (vu)(bias == vf_set1(-INFINITY));
    return (vf)(((vu)s & ~is) | ((vu)hidden & is));
}

/* cap tanh(scale s k_scale / cap) + bias for lanes from i on */
FC_INLINE vf attention_score(const struct fc_attention_row *r, ptrdiff_t i, ptrdiff_t n) {
    vf s = vf_get_upto(FC_F32, r->s, i, n);
    if (r->scale != 1.0f) s *= vf_set1(r->scale);
    if (r->k_scale) s *= vf_get_upto(FC_F32, r->k_scale, i, n);
    if (r->softcap > 0.0f) s = vf_set1(r->softcap) * vf_tanh(s / vf_set1(r->softcap));
    if (!r->bias) return s;
    const vf bias = vf_get_upto(FC_F32, r->bias, i, n);
    return unless_hidden(bias, s + bias, bias);
}

/* max of s[n], and of its tail's lanes */
FC_INLINE vf max_of(const float *s, ptrdiff_t n) {
    vf top[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) top[j] = vf_set1(-INFINITY);
    ptrdiff_t i = 0;
    for (; i + 4 * FC_N <= n; i += 4 * FC_N)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) top[j] = vf_max(top[j], vf_load(s + i + j * FC_N));
    for (; i + FC_N <= n; i += FC_N) top[0] = vf_max(top[0], vf_load(s + i));
    if (i < n) top[0] = vf_max(top[0], vf_fill_from(vf_load_n(s + i, n - i), n - i, -INFINITY));
    return vf_max(vf_max(top[0], top[1]), vf_max(top[2], top[3]));
}

/* s[n] <- scale s k_scale */
FC_INLINE void scale_scores(const struct fc_attention_row *r, ptrdiff_t n) {
    const vf scale = vf_set1(r->scale);
    ptrdiff_t i = 0;
    for (; i + FC_N <= n; i += FC_N) vf_store(r->s + i, vf_load(r->s + i) * scale * vf_load(r->k_scale + i));
    if (i < n) vf_store_n(r->s + i, vf_load_n(r->s + i, n - i) * scale * vf_load_n(r->k_scale + i, n - i), n - i);
}

/* e^(s - shift) */
FC_INLINE vf weight(vf s, vf shift) { return vf_exp2_negative((s - shift) * vf_set1(1.44269504f)); }

/* s[n] <- e^(s - shift); the sum */
FC_INLINE vf weights_of(float *s, ptrdiff_t n, vf shift) {
    vf total = vf_zero();
    ptrdiff_t i = 0;
    for (; i + FC_N <= n; i += FC_N) {
        vf e = weight(vf_load(s + i), shift);
        total += e;
        vf_store(s + i, e);
    }
    if (i < n) {
        vf e = vf_fill_from(weight(vf_load_n(s + i, n - i), shift), n - i, 0.0f);
        total += e;
        vf_store_n(s + i, e, n - i);
    }
    return total;
}

/* e^(scale s - shift), and 0 for lanes from n on */
FC_INLINE vf scaled_weights(const float *s, ptrdiff_t n, vf scale, vf shift) {
    if (n >= FC_N) return vf_exp2(vf_fma(vf_load(s), scale, shift));
    return vf_fill_from(vf_exp2(vf_fma(vf_load_n(s, n), scale, shift)), n, 0.0f);
}

/* bf16[n] <- e^(scale (s - max)), scale > 0; the sum before rounding. Both vectors of a pair are read before it is
 * written where they lay. */
FC_INLINE vf bfloat16_weights_of(const struct fc_attention_row *r, ptrdiff_t n, float scale, float max) {
    const vf factor = vf_set1(scale * 1.44269504f), shift = vf_set1(max == -INFINITY ? 0.0f : -max) * factor;
    vf total = vf_zero(), more = vf_zero();
    ptrdiff_t i = 0;
    for (; i + 2 * FC_N <= n; i += 2 * FC_N) {
        const vf a = scaled_weights(r->s + i, FC_N, factor, shift);
        const vf b = scaled_weights(r->s + i + FC_N, FC_N, factor, shift);
        total += a, more += b;
        vf_store(r->bf16 + i, vf_bf16_pair_of_normals(a, b));
    }
    if (i < n) {
        uint16_t last[2 * FC_N];
        const vf a = scaled_weights(r->s + i, n - i, factor, shift);
        const vf b = n - i > FC_N ? scaled_weights(r->s + i + FC_N, n - i - FC_N, factor, shift) : vf_zero();
        total += a, more += b;
        vf_store(last, vf_bf16_pair_of_normals(a, b));
        memcpy(r->bf16 + i, last, (size_t)(n - i) * 2);
    }
    return total + more;
}

/* w v_scale for lanes from i on, 0 where the mask hides the key: its v_scale may be infinite */
FC_INLINE vf scaled_weight(const struct fc_attention_row *r, ptrdiff_t i, ptrdiff_t n, int masked) {
    const vf w = vf_get_upto(FC_F32, r->s, i, n) * vf_get_upto(FC_F32, r->v_scale, i, n);
    return masked ? unless_hidden(vf_get_upto(FC_F32, r->bias, i, n), w, vf_zero()) : w;
}

/* q[n] w_scale ~ e^(s - shift) v_scale; the sum before v_scale */
FC_INLINE vf integer_weights_of(const struct fc_attention_row *r, ptrdiff_t n, vf shift, int masked) {
    const vf total = weights_of(r->s, n, shift);
    vf top = vf_zero(), poison = vf_zero();
    ptrdiff_t i = 0;
    for (; i + FC_N <= n; i += FC_N) {
        vf w = scaled_weight(r, i, n, masked);
        top = vf_max(w, top);
        poison += w * 0.0f;
        vf_store(r->s + i, w);
    }
    if (i < n) {
        vf w = scaled_weight(r, i, n, masked);
        top = vf_max(w, top);
        poison += w * 0.0f;
        vf_store_n(r->s + i, w, n - i);
    }
    float inverse;
    quantize_scales(r->w_scale, &inverse, vf_hmax(top), vf_sum(poison), 32767.0f);
    put_s16(r->q, r->s, n, inverse);
    return total;
}

/* s[n]: score -> e^(score - max), and, with v_scale, q and w_scale from that, or bf16; max, and the sum of
 * e^(score - max). A row with nothing to see leaves zeros and sum 0; NaN scores stay NaN, and make the sum NaN. */
static void attention_row(const struct fc_attention_row *r, ptrdiff_t n, float *max, float *sum) {
    const int plain = !r->bias && !(r->softcap > 0.0f);
    if (r->bf16 && plain && r->scale > 0.0f) {
        const float top = vf_hmax(max_of(r->s, n));
        *max = r->scale * top;
        *sum = vf_sum(bfloat16_weights_of(r, n, r->scale, top));
        return;
    }
    if (!plain || (r->scale != 1.0f && !r->k_scale))
        for (ptrdiff_t i = 0; i < n; i += FC_N) vf_put_upto(FC_F32, r->s, i, attention_score(r, i, n), n);
    else if (r->k_scale) scale_scores(r, n);
    const float m = vf_hmax(max_of(r->s, n));
    const vf shift = vf_set1(m == -INFINITY ? 0.0f : m);
    *max = m;
    if (r->bf16) *sum = vf_sum(bfloat16_weights_of(r, n, 1.0f, m));
    else if (!r->v_scale) *sum = vf_sum(weights_of(r->s, n, shift));
    else if (r->bias) *sum = vf_sum(integer_weights_of(r, n, shift, 1));
    else *sum = vf_sum(integer_weights_of(r, n, shift, 0));
}

/* Vector j of the values of `key` in a panel of V at w. */
FC_INLINE vf value_of(fc_kv_type type, const char *w, ptrdiff_t key, int j) {
    if (type == FC_KV_F32) return vf_load(w + key * 64 + j * FC_BYTES);
    vu pair = (vu)vf_load(w + key / 2 * 64 + j * FC_BYTES);
    return (vf)(key % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
}

/* c (panels) += x[lo:hi) V[lo:hi) for one row, whatever lo and hi are: the chain of gemm's tile, and where pairs of
 * keys are multiplied at once, half a pair with a zero for the other half. */
FC_INLINE void pv_partial(fc_kv_type type, const struct fc_gemm *g, ptrdiff_t lo, ptrdiff_t hi) {
    const char *w = g->w;
    for (ptrdiff_t p = 0; p < g->panels; p++, w += g->panel_stride)
        for (int j = 0; j < FC_PER_PANEL; j++) {
            float *c = g->c + p * 16 + j * FC_N;
            vf acc = vf_load(c);
#ifdef FC_HAS_BF16_DOT
            if (type == FC_KV_BF16) {
                for (ptrdiff_t key = lo / 2 * 2; key < hi; key += 2) {
                    const uint32_t keep = (key >= lo ? 0xffffu : 0) | (key + 1 < hi ? 0xffff0000u : 0);
                    uint32_t pair;
                    memcpy(&pair, (const char *)g->x + key * 2, 4);
                    acc =
                        vf_dot_bf16(acc, (vu)vf_load(w + key / 2 * 64 + j * FC_BYTES) & keep, (vu){0} + (pair & keep));
                }
                vf_store(c, acc);
                continue;
            }
#endif
            for (ptrdiff_t key = lo; key < hi; key++)
                acc = vf_add_product(acc, vf_set1(((const float *)g->x)[key]), value_of(type, w, key, j));
            vf_store(c, acc);
        }
}

static void pv_partial_lines(const struct fc_gemm *g, fc_kv_type type, ptrdiff_t lo, ptrdiff_t hi) {
    if (type == FC_KV_F32) pv_partial(FC_KV_F32, g, lo, hi);
    else pv_partial(FC_KV_BF16, g, lo, hi);
}

/* Whether x[n] holds neither an infinity nor a NaN */
static void all_finite(int *yes, const float *x, ptrdiff_t n) {
    vf poison = vf_zero();
    for (ptrdiff_t i = 0; i < n; i += FC_N) poison += vf_get_upto(FC_F32, x, i, n) * 0.0f;
    *yes = vf_sum(poison) == 0.0f;
}

/* (o, max, sum) <- its union with a chunk's (o_part, max_part, sum_part); an empty chunk changes nothing. */
static void attention_fold(float *o, float *max, float *sum, const float *o_part, float max_part, float sum_part,
                           ptrdiff_t n) {
    if (sum_part == 0.0f) return;
    const int first = *sum == 0.0f;
    const float top = first || *max < max_part ? max_part : *max;
    const float keep = first ? 0.0f : *max == top ? 1.0f : weight(vf_set1(*max), vf_set1(top))[0];
    const float add = max_part == top ? 1.0f : weight(vf_set1(max_part), vf_set1(top))[0];
    const vf vkeep = vf_set1(keep), vadd = vf_set1(add);
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        const vf part = vf_load(o_part + i) * vadd;
        vf_store(o + i, first ? part : vf_fma(vf_load(o + i), vkeep, part));
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
