/* relu(x) = max(x, 0)                      silu(x) = x / (1 + e^-x)                arXiv 1702.03118
 * gelu(x) = x Phi(x)                       gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
 *         (which is 0.5 x (1 + tanh(..)) without its cancellation)                 arXiv 1606.08415
 * and the gated forms f(gate) * up: reglu, swiglu, geglu, geglu_tanh          arXiv 2002.05202 */

FC_INLINE vf vf_activate(fc_activation f, vf x) {
    if (f == FC_RELU) return vf_max(vf_zero(), x);
    if (f == FC_SILU) return vf_times_sigmoid(x, x);
    if (f == FC_GELU) return vf_times_normal_cdf(x);
    return vf_times_sigmoid(x, x * vf_fma(x * x, vf_set1(0.0713548163f), vf_set1(1.59576912f)));
}

/* for results of type t: exponents times 2^23, as vf_exp2_short has them */
FC_INLINE vf vf_activate_short(fc_activation f, fc_dtype t, vf x) {
    const int degree = t == FC_BF16 ? 3 : 4;
    const vf bias = vf_set1(0x1.9cp29f), log2e = vf_set1(-12102203.2f); /* 2^23 (127 - 24), -2^23 log2(e) */
    if (f == FC_RELU) return vf_max(vf_zero(), x);
    if (f == FC_SILU) return vf_times_sigmoid_short(degree, x, vf_fma(x, log2e, bias));
#ifdef FC_HAS_LOOK_UP_32
    if (f == FC_GELU && t == FC_BF16) return vf_times_normal_cdf_bf16(x);
#endif
    if (f == FC_GELU) return vf_times_normal_cdf_short(degree, x);
    const vf slope = vf_fma(x * x, vf_set1(-863550.486f), vf_set1(-19312322.1f));
    return vf_times_sigmoid_short(degree, x, vf_fma(x, slope, bias));
}

/* FC_BYTES of f(x) or f(x) up, from value i on */
FC_INLINE vf activated(fc_activation f, fc_dtype t, const void *x, const void *up, ptrdiff_t i) {
    vf a, b, c, d;
    if (t == FC_F32) {
        a = vf_activate(f, vf_get(t, x, i));
        return up ? a * vf_get(t, up, i) : a;
    }
    vf_get_pair(t, x, i, &a, &b);
    a = vf_activate_short(f, t, a), b = vf_activate_short(f, t, b);
    if (up) {
        vf_get_pair(t, up, i, &c, &d);
        a *= c, b *= d;
    }
    return vf_of_pair(t, a, b);
}

/* n values, fewer than FC_BYTES hold */
FC_INLINE void activate_few(fc_activation f, fc_dtype t, void *out, const void *x, const void *up, ptrdiff_t n) {
    if (t == FC_F32) {
        const vf a = vf_activate(f, vf_load_n(x, n));
        vf_store_n(out, up ? a * vf_load_n(up, n) : a, n);
        return;
    }
    const size_t bytes = (size_t)(n * fc_size_of(t));
    char a[FC_BYTES] = {0}, b[FC_BYTES] = {0}, y[FC_BYTES];
    memcpy(a, x, bytes);
    if (up) memcpy(b, up, bytes);
    vf_store(y, activated(f, t, a, up ? b : NULL, 0));
    memcpy(out, y, bytes);
}

/* n values, fewer than FC_BYTES hold, past the caches */
FC_INLINE void stream_few(fc_activation f, fc_dtype t, struct fc_stream *stream, char *out, const void *x,
                          const void *up, ptrdiff_t n) {
    char some[FC_BYTES];
    if (n) activate_few(f, t, some, x, up, n);
    stream_row(stream, out, some, n * fc_size_of(t), NULL); /* no copy here: gcc 13 warns of its loops over whole vectors */
}

/* Bytes ahead in the inputs of large results: into the second cache, and from there into the first, or else each load
 * waits among the stores that go past them, for as long as the operations after it fill the processor's queue. */
enum { ACTIVATION_PREFETCH = 4096, ACTIVATION_PREFETCH_L1 = 1024 };

FC_INLINE void activation_prefetch(const char *x) {
    __builtin_prefetch(x + ACTIVATION_PREFETCH, 0, 2);
    __builtin_prefetch(x + ACTIVATION_PREFETCH_L1, 0, 3);
}

/* out[n] = f(x) or f(x) up, past the caches: whole vectors go there from registers */
FC_INLINE void activate_streamed(fc_activation f, fc_dtype t, struct fc_stream *stream, char *out, const char *x,
                                 const char *up, ptrdiff_t n) {
    const ptrdiff_t size = fc_size_of(t), step = FC_BYTES / size;
    ptrdiff_t i = (ptrdiff_t)(-(uintptr_t)out % FC_BYTES) / size;
    if (i > n) i = n;
    stream_few(f, t, stream, out, x, up, i);
    for (; i + 2 * step <= n; i += 2 * step) {
#pragma GCC unroll 2
        for (ptrdiff_t j = 0; j < 2 * FC_BYTES; j += FC_BYTES < 64 ? 2 * FC_BYTES : FC_BYTES) {
            activation_prefetch(x + i * size + j);
            if (up) activation_prefetch(up + i * size + j);
        }
#pragma GCC unroll 2
        for (ptrdiff_t j = i; j < i + 2 * step; j += step)
            vf_stream((float *)(void *)(out + j * size), activated(f, t, x, up, j));
        stream->end = out + (i + 2 * step) * size;
    }
    for (; i < n; i += step) {
        const ptrdiff_t count = n - i < step ? n - i : step;
        stream_few(f, t, stream, out + i * size, x + i * size, up ? up + i * size : NULL, count);
    }
}

/* stream: where results go past the caches, or NULL */
FC_INLINE void activate_row(fc_activation f, fc_dtype t, void *out, const void *x, const void *up, ptrdiff_t n,
                            struct fc_stream *stream) {
    const ptrdiff_t size = fc_size_of(t), step = FC_BYTES / size;
    if (stream && (uintptr_t)out % (size_t)size == 0) {
        activate_streamed(f, t, stream, out, x, up, n);
        return;
    }
    ptrdiff_t i = 0;
    for (; i + step <= n; i += step) vf_store((char *)out + i * size, activated(f, t, x, up, i));
    if (i < n)
        activate_few(f, t, (char *)out + i * size, (const char *)x + i * size,
                     up ? (const char *)up + i * size : NULL, n - i);
}

FC_INLINE void relu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, struct fc_stream *stream) {
    activate_row(FC_RELU, t, out, x, NULL, n, stream);
}
FC_INLINE void silu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, struct fc_stream *stream) {
    activate_row(FC_SILU, t, out, x, NULL, n, stream);
}
FC_INLINE void gelu_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, struct fc_stream *stream) {
    activate_row(FC_GELU, t, out, x, NULL, n, stream);
}
FC_INLINE void gelu_tanh_any(fc_dtype t, void *out, const void *x, ptrdiff_t n, struct fc_stream *stream) {
    activate_row(FC_GELU_TANH, t, out, x, NULL, n, stream);
}

FC_INLINE void reglu_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n,
                          struct fc_stream *stream) {
    activate_row(FC_RELU, t, out, gate, up, n, stream);
}
FC_INLINE void swiglu_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n,
                          struct fc_stream *stream) {
    activate_row(FC_SILU, t, out, gate, up, n, stream);
}
FC_INLINE void geglu_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n,
                          struct fc_stream *stream) {
    activate_row(FC_GELU, t, out, gate, up, n, stream);
}
FC_INLINE void geglu_tanh_any(fc_dtype t, void *out, const void *gate, const void *up, ptrdiff_t n,
                          struct fc_stream *stream) {
    activate_row(FC_GELU_TANH, t, out, gate, up, n, stream);
}
