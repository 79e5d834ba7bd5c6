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

/* ---- a decode step: few rows, so memory is the limit ----
 * The chains over d and over keys are those of gemm_f32, hence the bits; only the order of reading memory differs. */

/* Of the 16 rows of `bytes` bytes at w, ask for the part [done, done + step) of `all`. Never many at once:
 * what finds no free miss buffer is dropped. */
FC_INLINE void ask_for_rows(const char *w, ptrdiff_t ldw, ptrdiff_t bytes, ptrdiff_t done, ptrdiff_t step,
                            ptrdiff_t all) {
    for (ptrdiff_t i = 16 * done / all; i < 16 * (done + step) / all; i++)
        for (ptrdiff_t b = 0; b < bytes; b += 64) __builtin_prefetch(w + i * ldw + b, 0, 2);
}

/* scores[rows][16] = q k^T for 16 keys of d channels, d a multiple of FC_N: blocks of keys are transposed in registers
 * and multiplied there. The 16 keys after them are asked for meanwhile if `more`. */
FC_INLINE void score_panel(fc_dtype t, const int rows, float *scores, ptrdiff_t ld, const float *q, ptrdiff_t d, const char *k,
                           ptrdiff_t ldk, int more) {
    for (int j0 = 0; j0 < 16; j0 += FC_N) {
        vf acc[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) acc[r] = vf_zero();
        for (ptrdiff_t i = 0; i < d; i += FC_N) {
            vf block[FC_N];
            if (more && j0 == 0) ask_for_rows(k + 16 * ldk, ldk, d * (t == FC_F32 ? 4 : 2), i, FC_N, d);
            if (t != FC_F32 || ldk % 2048 == 0) {
                /* Rows this far apart share a few sets of L1: each line is read once, not in quarters. */
#pragma GCC unroll 16
                for (int j = 0; j < FC_N; j++) block[j] = vf_get(t, k + (j0 + j) * ldk, i);
                vf_transpose(block);
            } else vf_load_transposed(block, k + j0 * ldk + i * 4, ldk);
#pragma GCC unroll 16
            for (int j = 0; j < FC_N; j++)
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) acc[r] = vf_fma(vf_set1(q[r * d + i + j]), block[j], acc[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) vf_store(scores + r * ld + j0, acc[r]);
    }
}

FC_INLINE void attention_panel_any(fc_dtype t, float *scores, ptrdiff_t ld, const float *q, ptrdiff_t rows, ptrdiff_t d,
                                   const char *k, ptrdiff_t ldk, int more) {
    switch (rows) {
    case 1: score_panel(t, 1, scores, ld, q, d, k, ldk, more); break;
    case 2: score_panel(t, 2, scores, ld, q, d, k, ldk, more); break;
    case 3: score_panel(t, 3, scores, ld, q, d, k, ldk, more); break;
    default: score_panel(t, 4, scores, ld, q, d, k, ldk, more); break;
    }
}

enum { FC_WIDE = FC_BYTES == 64 ? 8 : 4 }; /* vectors of a row of V at once: two rows of o fill the registers */

FC_INLINE void weigh_tile(fc_dtype t, const int rows, const int nv, float *o, ptrdiff_t ldo, const float *p, ptrdiff_t ldp,
                          const char *v, ptrdiff_t ldv, ptrdiff_t column, ptrdiff_t keys, int accumulate) {
    vf acc[2][FC_WIDE];
    o += column;
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) acc[r][j] = accumulate ? vf_load(o + r * ldo + j * FC_N) : vf_zero();
    for (; keys > 0; keys--, p++, v += ldv)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            vf wv = vf_get(t, v, column + j * FC_N);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) acc[r][j] = vf_fma(vf_set1(p[r * ldp]), wv, acc[r][j]);
        }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) vf_store(o + r * ldo + j * FC_N, acc[r][j]);
}

FC_INLINE void weigh_rows(fc_dtype t, const int rows, float *o, ptrdiff_t ldo, const float *p, ptrdiff_t ldp, const char *v,
                          ptrdiff_t ldv, ptrdiff_t n, ptrdiff_t keys, int accumulate) {
    ptrdiff_t j = 0;
    for (; j + FC_WIDE * FC_N <= n; j += FC_WIDE * FC_N)
        weigh_tile(t, rows, FC_WIDE, o, ldo, p, ldp, v, ldv, j, keys, accumulate);
    for (; j < n; j += FC_N) weigh_tile(t, rows, 1, o, ldo, p, ldp, v, ldv, j, keys, accumulate);
}

/* o[rows][n] (+)= p[rows][keys] V, n a multiple of 16, rows of o and p ld floats apart, of V ldv bytes. Whole rows of V, in
 * the order of memory: that is what the hardware's prefetcher follows; 16 keys at a time, so that the next two rows find
 * them in L1. */
FC_INLINE void attention_weigh_any(fc_dtype t, float *o, ptrdiff_t ldo, const float *p, ptrdiff_t ldp, const char *v,
                                   ptrdiff_t ldv, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t keys, int accumulate) {
    for (ptrdiff_t k = 0; k < keys; k += 16, p += 16, v += 16 * ldv, accumulate = 1) {
        const ptrdiff_t block = keys - k < 16 ? keys - k : 16;
        ptrdiff_t r = 0;
        for (; r + 2 <= rows; r += 2) weigh_rows(t, 2, o + r * ldo, ldo, p + r * ldp, ldp, v, ldv, n, block, accumulate);
        if (r < rows) weigh_rows(t, 1, o + r * ldo, ldo, p + r * ldp, ldp, v, ldv, n, block, accumulate);
    }
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
