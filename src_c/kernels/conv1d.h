/* Depthwise causal convolution, channels in lanes, for up to CONV_TOKENS tokens at a time, which share what they read:
 *     out[t][c] = f(bias[c] + sum over k < width of weight[k][c] x[t + k][c])        f: nothing, or silu
 * x begins width - 1 tokens before out. The sum goes from k = 0 on, whatever the width and the number of tokens. */

enum { CONV_TOKENS = 4, CONV_TAPS = 4 }; /* widths up to CONV_TAPS are unrolled: their x is read once for all tokens */

/* ldw: floats from one tap's weights (n) to the next, or 0: they are panels (n / FC_PANEL, width, FC_PANEL). Zeros
 * beyond n, up to a whole panel. */
struct conv1d {
    const char *x; /* (tokens + width - 1, n), ldx bytes apart */
    const float *w, *bias;
    ptrdiff_t ldx, ldw, width, n;
};

/* of a sum in float32, for a result of type t */
FC_INLINE vf conv1d_silu(fc_dtype t, vf x) {
    return t == FC_F32 ? vf_activate(FC_SILU, x) : vf_activate_short(FC_SILU, t, x);
}

/* out[n] = silu(x), x sums in float32 */
FC_INLINE void silu_of_sums_any(fc_dtype t, void *out, const float *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) vf_put_upto(t, out, i, conv1d_silu(t, vf_get_upto(FC_F32, x, i, n)), n);
}

/* acc[r] = token r of a vector of channels at i. taps: the width where it is CONV_TAPS, else 0; whole: the vector lies
 * inside the row. */
FC_INLINE void conv1d_vector(fc_dtype t, vf *acc, const struct conv1d *c, ptrdiff_t i, const int tokens, const int taps,
                             const int silu, const int whole) {
    const ptrdiff_t n = c->n, left = n - i, tap = c->ldw ? c->ldw : FC_PANEL;
    const float *w = c->w + (c->ldw ? i : i / FC_PANEL * c->width * FC_PANEL + i % FC_PANEL);
    const char *x = c->x;
    const vf start = !c->bias ? vf_zero() : whole ? vf_load(c->bias + i) : vf_load_n(c->bias + i, left);
#pragma GCC unroll 4
    for (int r = 0; r < tokens; r++) acc[r] = start;
    if (taps) {
        vf a[CONV_TOKENS + CONV_TAPS - 1];
#pragma GCC unroll 8
        for (int j = 0; j < tokens + CONV_TAPS - 1; j++)
            a[j] = whole ? vf_get(t, x + j * c->ldx, i) : vf_get_n(t, x + j * c->ldx, i, left);
#pragma GCC unroll 4
        for (int k = 0; k < CONV_TAPS; k++) {
            const vf weight = vf_load(w + k * tap);
#pragma GCC unroll 4
            for (int r = 0; r < tokens; r++) acc[r] = vf_fma(weight, a[k + r], acc[r]);
        }
    } else {
        for (ptrdiff_t k = 0; k < c->width; k++, x += c->ldx, w += tap) {
            const vf weight = vf_load(w);
#pragma GCC unroll 4
            for (int r = 0; r < tokens; r++)
                acc[r] = vf_fma(weight, whole ? vf_get(t, x + r * c->ldx, i) : vf_get_n(t, x + r * c->ldx, i, left),
                                acc[r]);
        }
    }
    if (!silu) return;
#pragma GCC unroll 4
    for (int r = 0; r < tokens; r++) acc[r] = conv1d_silu(t, acc[r]);
}

/* out (tokens, n), ldo bytes apart */
FC_INLINE void conv1d_rows(fc_dtype t, char *out, ptrdiff_t ldo, const struct conv1d *c, const int tokens,
                           const int taps, const int silu) {
    vf acc[CONV_TOKENS];
    ptrdiff_t i = 0;
    for (; i + FC_N <= c->n; i += FC_N) {
        conv1d_vector(t, acc, c, i, tokens, taps, silu, 1);
#pragma GCC unroll 4
        for (int r = 0; r < tokens; r++) {
            vf_put(t, out + r * ldo, i, acc[r]);
            if (tokens == CONV_TOKENS && i * fc_size_of(t) % FC_LINE == 0) {
                __builtin_prefetch(c->x + (c->width - 1 + CONV_TOKENS + r) * c->ldx + i * fc_size_of(t), 0, 2);
                __builtin_prefetch(out + (CONV_TOKENS + r) * ldo + i * fc_size_of(t), 1, 2);
            }
        }
    }
    if (i == c->n) return;
    conv1d_vector(t, acc, c, i, tokens, taps, silu, 0);
#pragma GCC unroll 4
    for (int r = 0; r < tokens; r++) vf_put_n(t, out + r * ldo, i, acc[r], c->n - i);
}

FC_INLINE void conv1d_kept(fc_dtype t, char *out, ptrdiff_t ldo, const struct conv1d *c, ptrdiff_t tokens,
                           const int silu) {
    if (tokens == CONV_TOKENS && c->width == CONV_TAPS) {
        conv1d_rows(t, out, ldo, c, CONV_TOKENS, CONV_TAPS, silu);
        return;
    }
    struct conv1d one = *c;
    for (ptrdiff_t r = 0; r < tokens; r++, one.x += c->ldx) conv1d_rows(t, out + r * ldo, ldo, &one, 1, 0, silu);
}

/* out (tokens, n), x (tokens + width - 1, n), ldo and ldx bytes apart; 1 <= tokens <= CONV_TOKENS; weight: panels */
FC_INLINE void conv1d_any(fc_dtype t, void *out, ptrdiff_t ldo, const void *x, ptrdiff_t ldx, const float *weight,
                          const float *bias, ptrdiff_t n, ptrdiff_t tokens, ptrdiff_t width, int silu) {
    const struct conv1d c = {.x = x, .w = weight, .bias = bias, .ldx = ldx, .width = width, .n = n};
    if (silu) conv1d_kept(t, out, ldo, &c, tokens, 1);
    else conv1d_kept(t, out, ldo, &c, tokens, 0);
}

/* ---- past the caches: rows of out that follow each other, each a multiple of FC_LINE bytes ----
 * A row lacks `lead` bytes of its first aligned vector, which the row before it begins. Such a vector is put together
 * from the last whole vector of the one and the first of the other, and goes out with the next tokens: what was only
 * just stored piece by piece could not be loaded before all earlier stores have left the processor. */

FC_INLINE vf conv1d_packed(fc_dtype t, const vf *a, const vf *b, int r) {
    return t == FC_F32 ? a[r] : vf_halves(t, a[r], b[r]);
}

/* to[r] = FC_BYTES of token r from channel i on */
FC_INLINE void conv1d_bytes(fc_dtype t, vf *to, const struct conv1d *c, ptrdiff_t i, const int taps, const int silu) {
    vf a[CONV_TOKENS], b[CONV_TOKENS] = {0};
    conv1d_vector(t, a, c, i, CONV_TOKENS, taps, silu, 1);
    if (t != FC_F32) conv1d_vector(t, b, c, i + FC_N, CONV_TOKENS, taps, silu, 1);
#pragma GCC unroll 4
    for (int r = 0; r < CONV_TOKENS; r++) to[r] = conv1d_packed(t, a, b, r);
}

FC_INLINE void seams_out(struct fc_seams *s) {
    for (int r = s->from; r < CONV_TOKENS; r++)
        vf_stream((float *)(void *)(s->at + r * s->row), vf_load(s->lines[r] + FC_BYTES));
    s->from = CONV_TOKENS;
}

static void seams_end(struct fc_seams *s) {
    seams_out(s);
    if (s->end) memcpy(s->end - s->tail, s->last + FC_BYTES - s->tail, (size_t)s->tail);
    s->end = NULL;
    vf_stream_end();
}

/* first, last: of each token, the first and the last FC_BYTES */
FC_INLINE void seams_put(struct fc_seams *s, char *out, ptrdiff_t row, ptrdiff_t lead, const vf *first,
                         const vf *last) {
    const ptrdiff_t tail = (FC_BYTES - lead) % FC_BYTES;
    if (s->end && s->end != out) seams_end(s);
    seams_out(s);
    if (lead) {
        const int begun = s->end == out;
        vf before = begun ? vf_load(s->last) : first[0];
        for (int r = 0; r < CONV_TOKENS; r++) {
            vf_store(s->lines[r] + tail, before);
            vf_store(s->lines[r] + FC_BYTES + tail, first[r]);
            before = last[r];
        }
        if (!begun) memcpy(out, s->lines[0] + FC_BYTES + tail, (size_t)lead);
        vf_store(s->last, before);
        s->from = begun ? 0 : 1;
    }
    s->at = out - tail, s->end = out + CONV_TOKENS * row, s->row = row, s->tail = tail;
}

FC_INLINE void conv1d_past(fc_dtype t, struct fc_seams *seams, char *out, const struct conv1d *c, const int taps,
                           const int silu) {
    const ptrdiff_t size = fc_size_of(t), row = c->n * size, step = FC_BYTES / size;
    const ptrdiff_t lead = (ptrdiff_t)(-(uintptr_t)out % FC_BYTES), end = c->n - (FC_BYTES - lead) % FC_BYTES / size;
    const char *next = c->x + (c->width - 1 + CONV_TOKENS) * c->ldx; /* what comes later, prefetched on the way */
    vf a[CONV_TOKENS], b[CONV_TOKENS];
    if (lead) {
        conv1d_bytes(t, a, c, 0, taps, silu);
        conv1d_bytes(t, b, c, c->n - step, taps, silu);
    }
    seams_put(seams, out, row, lead, a, b);
    for (ptrdiff_t i = lead / size; i < end; i += step) {
        conv1d_bytes(t, a, c, i, taps, silu);
#pragma GCC unroll 4
        for (int r = 0; r < CONV_TOKENS; r++) {
            __builtin_prefetch(next + r * c->ldx + i * size, 0, 2);
            vf_stream((float *)(void *)(out + r * row + i * size), a[r]);
        }
    }
}

/* conv1d for CONV_TOKENS tokens past the caches; weight: rows (width, n), ldw floats apart */
FC_INLINE void conv1d_streamed_any(fc_dtype t, struct fc_seams *seams, void *out, const void *x, ptrdiff_t ldx,
                                   const float *weight, ptrdiff_t ldw, const float *bias, ptrdiff_t n, ptrdiff_t width,
                                   int silu) {
    const struct conv1d c = {.x = x, .w = weight, .bias = bias, .ldx = ldx, .ldw = ldw, .width = width, .n = n};
    if (width == CONV_TAPS) {
        if (silu) conv1d_past(t, seams, out, &c, CONV_TAPS, 1);
        else conv1d_past(t, seams, out, &c, CONV_TAPS, 0);
    } else {
        if (silu) conv1d_past(t, seams, out, &c, 0, 1);
        else conv1d_past(t, seams, out, &c, 0, 0);
    }
}
