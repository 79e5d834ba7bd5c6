/* Depthwise causal convolution, channels in lanes, for up to CONV_TOKENS tokens at a time, which share what they read:
 *     out[t][c] = f(bias[c] + sum over k < width of weight[c][k] x[t + k][c])        f: nothing, or silu
 * x begins width - 1 tokens before out. The sum goes from k = 0 on, whatever the width and the number of tokens.
 * weight: panels (channels / FC_PANEL, width, FC_PANEL), zeros beyond. */

enum { CONV_TOKENS = 4, CONV_TAPS = 4 }; /* widths up to CONV_TAPS are unrolled: their x is read once for all tokens */

/* A vector of channels at i; w: its weights. whole: it lies inside the row. */
FC_INLINE void conv1d_sums(fc_dtype t, vf *acc, const char *x, ptrdiff_t ldx, const float *w, ptrdiff_t i, ptrdiff_t n,
                           const int tokens, const int taps, ptrdiff_t width, const int whole) {
    if (taps) {
        vf a[CONV_TOKENS + CONV_TAPS - 1];
#pragma GCC unroll 8
        for (int j = 0; j < CONV_TOKENS + CONV_TAPS - 1; j++)
            a[j] = whole ? vf_get(t, x + j * ldx, i) : vf_get_n(t, x + j * ldx, i, n - i);
#pragma GCC unroll 4
        for (int k = 0; k < CONV_TAPS; k++) {
            vf weight = vf_load(w + k * FC_PANEL);
#pragma GCC unroll 4
            for (int r = 0; r < CONV_TOKENS; r++) acc[r] = vf_fma(weight, a[k + r], acc[r]);
        }
        return;
    }
    for (ptrdiff_t k = 0; k < width; k++, x += ldx, w += FC_PANEL) {
        vf weight = vf_load(w);
#pragma GCC unroll 4
        for (int r = 0; r < tokens; r++)
            acc[r] = vf_fma(weight, whole ? vf_get(t, x + r * ldx, i) : vf_get_n(t, x + r * ldx, i, n - i), acc[r]);
    }
}

FC_INLINE void conv1d_vector(fc_dtype t, char *out, ptrdiff_t ldo, const char *x, ptrdiff_t ldx, const float *w,
                             const float *bias, ptrdiff_t i, ptrdiff_t n, const int tokens, const int taps,
                             ptrdiff_t width, const int silu, const int whole) {
    vf acc[CONV_TOKENS];
    vf start = !bias ? vf_zero() : whole ? vf_load(bias + i) : vf_load_n(bias + i, n - i);
#pragma GCC unroll 4
    for (int r = 0; r < tokens; r++) acc[r] = start;
    conv1d_sums(t, acc, x, ldx, w + i / FC_PANEL * width * FC_PANEL + i % FC_PANEL, i, n, tokens, taps, width, whole);
#pragma GCC unroll 4
    for (int r = 0; r < tokens; r++) {
        vf y = silu ? vf_activate(FC_SILU, acc[r]) : acc[r];
        if (whole) vf_put(t, out + r * ldo, i, y);
        else vf_put_n(t, out + r * ldo, i, y, n - i);
    }
}

FC_INLINE void conv1d_rows(fc_dtype t, char *out, ptrdiff_t ldo, const char *x, ptrdiff_t ldx, const float *w,
                           const float *bias, ptrdiff_t n, const int tokens, const int taps, ptrdiff_t width,
                           const int silu) {
    ptrdiff_t i = 0;
    for (; i + FC_N <= n; i += FC_N)
        conv1d_vector(t, out, ldo, x, ldx, w, bias, i, n, tokens, taps, width, silu, 1);
    if (i < n) conv1d_vector(t, out, ldo, x, ldx, w, bias, i, n, tokens, taps, width, silu, 0);
}

/* out (tokens, n), x (tokens + width - 1, n), ldo and ldx bytes apart; 1 <= tokens <= CONV_TOKENS */
FC_INLINE void conv1d_any(fc_dtype t, void *out, ptrdiff_t ldo, const void *x, ptrdiff_t ldx, const float *weight,
                          const float *bias, ptrdiff_t n, ptrdiff_t tokens, ptrdiff_t width, int silu) {
    if (tokens == CONV_TOKENS && width == CONV_TAPS) {
        if (silu) conv1d_rows(t, out, ldo, x, ldx, weight, bias, n, CONV_TOKENS, CONV_TAPS, CONV_TAPS, 1);
        else conv1d_rows(t, out, ldo, x, ldx, weight, bias, n, CONV_TOKENS, CONV_TAPS, CONV_TAPS, 0);
    } else {
        for (ptrdiff_t r = 0; r < tokens; r++)
            conv1d_rows(t, (char *)out + r * ldo, ldo, (const char *)x + r * ldx, ldx, weight, bias, n, 1, 0, width,
                        silu);
    }
}
