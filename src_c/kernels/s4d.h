/* Diagonal state spaces (S4D, arXiv 2206.11893): a channel is a sum of complex modes,
 *     x = dA x + dB u,   y = sum of 2 Re(C x)
 * Channels in lanes; the modes of a few stay in registers over a block of tokens. dA is a sum of two floats: a slow
 * mode remembers 1 / (1 - |dA|) tokens, by which the error of a dA rounded once would grow. */

/* The floats of a mode, which ops/s4d.c makes of A, B, C and dt, in its order */
enum { DA_RE, DA_IM, DA_LOW_RE, DA_LOW_IM, DB_RE, DB_IM, TWO_C_RE, MINUS_TWO_C_IM };

FC_INLINE vf of_mode(const float *modes, int m, int kind) {
    return vf_load(modes + (m * FC_MODE_FLOATS + kind) * FC_PANEL);
}

/* `modes` (FC_N / 2 or 1) of them from m0 on, FC_N channels from p0 on, over all tokens of the block */
FC_INLINE void modes_over_tokens(const struct fc_head_scan *s, ptrdiff_t m0, ptrdiff_t p0, int modes) {
    const float *c = s->keys + p0 / FC_PANEL * s->line + m0 * FC_MODE_FLOATS * FC_PANEL + p0 % FC_PANEL;
    const ptrdiff_t tokens = s->tokens, width = s->width;
    const float *u = s->u + p0;
    float *y = s->y + p0;
    vf x[FC_N]; /* real and imaginary part of each mode */
    state_in(x, s, 2 * m0, p0, 2 * modes);
    for (ptrdiff_t t = 0; t < tokens; t++, u += width, y += width) {
        const vf ut = vf_load(u);
        vf sum = vf_load(y);
#pragma GCC unroll 8
        for (int m = 0; m < modes; m++) {
            const vf re = x[2 * m], im = x[2 * m + 1], minus_im = -im;
            vf a = vf_fma(of_mode(c, m, DA_LOW_IM), minus_im, of_mode(c, m, DB_RE) * ut);
            vf b = vf_fma(of_mode(c, m, DA_LOW_IM), re, of_mode(c, m, DB_IM) * ut);
            a = vf_fma(of_mode(c, m, DA_LOW_RE), re, a);
            b = vf_fma(of_mode(c, m, DA_LOW_RE), im, b);
            a = vf_fma(of_mode(c, m, DA_IM), minus_im, a);
            b = vf_fma(of_mode(c, m, DA_IM), re, b);
            x[2 * m] = vf_fma(of_mode(c, m, DA_RE), re, a);
            x[2 * m + 1] = vf_fma(of_mode(c, m, DA_RE), im, b);
            sum = vf_fma(of_mode(c, m, TWO_C_RE), x[2 * m], sum);
            sum = vf_fma(of_mode(c, m, MINUS_TWO_C_IM), x[2 * m + 1], sum);
        }
        vf_store(y, sum);
    }
    state_out(x, s, 2 * m0, p0, 2 * modes);
}

static void head_modes(const struct fc_head_scan *s) {
    const ptrdiff_t modes = s->n / 2;
    const uint64_t before = vf_flush_subnormals();
    memset(s->y, 0, (size_t)(s->tokens * s->width) * 4);
    for (ptrdiff_t p0 = 0; p0 < s->p; p0 += FC_N) {
        ptrdiff_t m = 0;
        for (; m + FC_N / 2 <= modes; m += FC_N / 2) modes_over_tokens(s, m, p0, FC_N / 2);
        for (; m < modes; m++) modes_over_tokens(s, m, p0, 1);
    }
    vf_keep_subnormals(before);
}

/* ---- the same as a convolution: y_t = sum over l of K_l u_(t-l),  K_l = sum over modes of 2 Re(C dA^l dB) ---- */

typedef double vd __attribute__((vector_size(FC_BYTES)));
typedef double vd_any __attribute__((vector_size(FC_BYTES), aligned(1), may_alias));
typedef int64_t vl __attribute__((vector_size(FC_BYTES)));
enum { VD_N = FC_BYTES / 8 };

/* 0 for what repeated products would leave among the subnormal numbers for ever; NaN stays */
FC_INLINE vd vd_without_tiny(vd a) {
    const vd size = (vd)((vl)a & INT64_MAX);
    return (vd)((vl)a & ~(vl)(size < 1e-290 - (vd){0}));
}

/* out[l] = sum of Re of the modes' terms l; powers (modes, 2, 8): real and imaginary parts of the next eight terms of
 * each, step (modes, 2): dA^8 */
static void mode_powers(float *out, double *powers, const double *step, ptrdiff_t modes, ptrdiff_t length) {
    for (ptrdiff_t l = 0; l < length; l += FC_POWERS) {
        vd sum[FC_POWERS / VD_N];
        for (int i = 0; i < FC_POWERS / VD_N; i++) sum[i] = (vd){0};
        for (ptrdiff_t m = 0; m < modes; m++) {
            const double s_re = step[2 * m], s_im = step[2 * m + 1];
#pragma GCC unroll 4
            for (int i = 0; i < FC_POWERS / VD_N; i++) {
                vd_any *p_re = (vd_any *)(powers + 2 * FC_POWERS * m + i * VD_N);
                vd_any *p_im = (vd_any *)(powers + 2 * FC_POWERS * m + FC_POWERS + i * VD_N);
                const vd re = *p_re, im = *p_im;
                sum[i] += re;
                *p_re = vd_without_tiny(re * s_re - im * s_im);
                *p_im = vd_without_tiny(re * s_im + im * s_re);
            }
        }
        for (ptrdiff_t i = 0; i < FC_POWERS && l + i < length; i++) {
            const float k = (float)sum[i / VD_N][i % VD_N];
            memcpy(out + l + i, &k, 4);
        }
    }
}
