/* Mamba's selective scan (arXiv 2312.00752), channels in lanes:
 *     delta = softplus(delta + bias),   softplus(x) = log(1 + e^x)
 *     h[n] = e^(delta A[n]) h[n] + delta u B[n]
 *     y = (D u + sum over n of h[n] C[n]) silu(z)
 * Token after token, so that no cut of a sequence changes a bit. What a token has for each channel, softplus and silu,
 * lies outside the loop over states. Inside are 14 operations of a vector with AVX-512, 17 without: step A[n], 10 or
 * 13 of 2^x, input B[n], h and y. On two vector units that is 0.44 cycles a state of a channel with 16 lanes, 1.06 with
 * 8. */

/* A token of n channels: step = delta log2(e), input = delta u, y = D u; channel c at c / FC_PANEL * stride +
 * c % FC_PANEL. next_u, next_delta: what will be read a run of tokens later; they may lie beyond an array's end. */
FC_INLINE void scan_begin_any(fc_dtype t, float *step, float *input, float *y, ptrdiff_t stride, const void *u,
                              const void *delta, const float *bias, const float *d, ptrdiff_t n, int softplus,
                              const void *next_u, const void *next_delta) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        const ptrdiff_t at = i / FC_PANEL * stride + i % FC_PANEL;
        vf x = vf_get_upto(t, u, i, n), dt = vf_get_upto(t, delta, i, n);
        if (bias) dt += vf_get_upto(FC_F32, bias, i, n);
        if (softplus) dt = vf_softplus(dt);
        vf_store(step + at, dt * vf_set1(1.44269504f));
        vf_store(input + at, dt * x);
        vf_store(y + at, d ? vf_get_upto(FC_F32, d, i, n) * x : vf_zero());
    }
    const ptrdiff_t bytes = n * fc_size_of(t);
    for (ptrdiff_t i = 0; i < bytes; i += FC_LINE) {
        __builtin_prefetch((const char *)next_u + i, 0, 2);
        __builtin_prefetch((const char *)next_delta + i, 0, 2);
    }
}

/* out = y silu(z), or y */
FC_INLINE void scan_end_any(fc_dtype t, void *out, const float *y, ptrdiff_t stride, const void *z, ptrdiff_t n,
                            const void *next_z) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        vf a = vf_load(y + i / FC_PANEL * stride + i % FC_PANEL);
        if (z) a *= vf_activate(FC_SILU, vf_get_upto(t, z, i, n));
        vf_put_upto(t, out, i, a, n);
    }
    if (next_z)
        for (ptrdiff_t i = 0; i < n * fc_size_of(t); i += FC_LINE) __builtin_prefetch((const char *)next_z + i, 0, 2);
}

enum { SCAN_STATES = 8 }; /* in registers: of AVX-512 beside the constants of 2^x */

/* States [i, i + states) of the vector of channels at c, in registers over all tokens. */
FC_INLINE void scan_group(const struct fc_scan *s, ptrdiff_t c, ptrdiff_t i, const int states) {
    vf h[SCAN_STATES];
    const ptrdiff_t p = c / FC_PANEL, lane = c % FC_PANEL, first = p * s->stride + lane;
    float *state = s->h + (p * s->n + i) * FC_PANEL + lane;
    const char *a = (const char *)(s->a + (p * s->n + i) * FC_PANEL + lane);
    const float *b = s->b + i, *out = s->c + i;
#pragma GCC unroll 8
    for (int k = 0; k < states; k++) h[k] = vf_load(state + k * FC_PANEL);
    for (ptrdiff_t at = first; at < first + s->tokens * FC_PANEL; at += FC_PANEL, b += s->n, out += s->n) {
        vf step = vf_load(s->step + at), input = vf_load(s->input + at), y = vf_load(s->y + at);
        const char *rates = opaque(a);
#pragma GCC unroll 8
        for (int k = 0; k < states; k++) {
            vf decay = vf_exp2(step * vf_load(rates + k * FC_PANEL * 4));
            h[k] = vf_fma(h[k], decay, input * vf_load1(b + k));
            y = vf_fma(h[k], vf_load1(out + k), y);
        }
        vf_store(s->y + at, y);
    }
#pragma GCC unroll 8
    for (int k = 0; k < states; k++) vf_store(state + k * FC_PANEL, h[k]);
}

static __attribute__((noinline)) void scan_states(const struct fc_scan *s) {
    for (ptrdiff_t c = 0; c < s->channels; c += FC_N) {
        ptrdiff_t i = 0;
        for (; i + SCAN_STATES <= s->n; i += SCAN_STATES) scan_group(s, c, i, SCAN_STATES);
        for (; i + 2 <= s->n; i += 2) scan_group(s, c, i, 2);
        if (i < s->n) scan_group(s, c, i, 1);
    }
}

/* y[t] += sum over n of h[n] C[t][n], from n = 0 on. A state that nothing is added to decays into subnormal numbers,
 * where it would stay, at a fortieth of the speed: they count as 0. */
static void scan(const struct fc_scan *s) {
    const uint64_t before = vf_flush_subnormals();
    scan_states(s);
    vf_keep_subnormals(before);
}

/* The first `columns` columns of a panel (k, FC_PANEL) as rows of k, ld bytes apart: what panel_cols has read */
static void panel_to_columns(float *out, ptrdiff_t ld, const float *panel, ptrdiff_t k, ptrdiff_t columns) {
    for (ptrdiff_t c = 0; c < columns; c += FC_N)
        for (ptrdiff_t i = 0; i < k; i += FC_N) {
            const ptrdiff_t rows = k - i < FC_N ? k - i : FC_N, few = columns - c < FC_N ? columns - c : FC_N;
            vf block[FC_N];
            for (int j = 0; j < FC_N; j++) block[j] = j < rows ? vf_load(panel + (i + j) * FC_PANEL + c) : vf_zero();
            vf_transpose(block);
            for (ptrdiff_t j = 0; j < few; j++)
                vf_put_upto(FC_F32, (char *)out + (c + j) * ld, i, block[j], k);
        }
}
