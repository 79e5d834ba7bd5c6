/* out = e / sum(e),  e = exp(x - max(x)), which stay in float32 between the passes: e[n], or out itself where it is
 * that and need not go past the caches. There, a row waits until the e of the next row are made, in float32 as its own
 * e, else as its results, in their place: what that takes to compute and what this takes to write go on together. */

/* out[n] = e share; of 16 bits, e as vf_get_pair has them, up to a whole pair of vectors. out may be e. */
FC_INLINE void softmax_scale(fc_dtype t, void *out, const float *e, ptrdiff_t n, vf share) {
    ptrdiff_t i = 0;
    for (; i + 2 * FC_N <= n; i += 2 * FC_N) {
        const vf a = vf_load(e + i) * share, b = vf_load(e + i + FC_N) * share;
        if (t == FC_F32) vf_put2(t, out, i, a, b);
        else vf_store((uint16_t *)out + i, vf_of_pair(t, a, b));
    }
    if (t == FC_F32) {
        for (; i < n; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(FC_F32, e, i, n) * share, n);
    } else if (i < n) {
        uint16_t last[2 * FC_N];
        vf_store(last, vf_of_pair(t, vf_load(e + i) * share, vf_load(e + i + FC_N) * share));
        memcpy((uint16_t *)out + i, last, (size_t)(n - i) * 2);
    }
}

/* The last numbers of a row of 16-bit ones, from i on, and -infinity */
FC_INLINE void softmax_last(fc_dtype t, uint16_t *last, const void *x, ptrdiff_t i, ptrdiff_t n) {
    for (int j = 0; j < 2 * FC_N; j++) last[j] = t == FC_F16 ? 0xfc00 : 0xff80;
    memcpy(last, (const uint16_t *)x + i, (size_t)(n - i) * 2);
}

FC_INLINE vf softmax_max(fc_dtype t, const void *x, ptrdiff_t n) {
    vf top[4], a, b;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) top[j] = vf_set1(-INFINITY);
    ptrdiff_t i = 0;
    for (; i + 4 * FC_N <= n; i += 4 * FC_N)
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
            vf_get_pair(t, x, i + j * FC_N, &a, &b);
            top[j] = vf_max(top[j], a), top[j + 1] = vf_max(top[j + 1], b);
        }
    if (t == FC_F32) {
        for (; i + FC_N <= n; i += FC_N) top[0] = vf_max(top[0], vf_get(t, x, i));
        if (i < n) top[0] = vf_max(top[0], vf_fill_from(vf_get_n(t, x, i, n - i), n - i, -INFINITY));
    }
    for (; t != FC_F32 && i < n; i += 2 * FC_N) {
        uint16_t last[2 * FC_N];
        const int whole = i + 2 * FC_N <= n;
        if (!whole) softmax_last(t, last, x, i, n);
        vf_get_pair(t, whole ? (const uint16_t *)x + i : last, 0, &a, &b);
        top[0] = vf_max(top[0], a), top[1] = vf_max(top[1], b);
    }
    return vf_set1(vf_hmax(vf_max(vf_max(top[0], top[1]), vf_max(top[2], top[3]))));
}

/* e[2 FC_N] = exp(x - max) from x[i] on; their sum so far */
FC_INLINE vf softmax_exp(fc_dtype t, float *e, const void *x, ptrdiff_t i, vf max, vf sum) {
    vf a, b;
    vf_get_pair(t, x, i, &a, &b);
    a = t == FC_F32 ? vf_exp_negative(a - max) : vf_exp_negative_short(a - max);
    b = t == FC_F32 ? vf_exp_negative(b - max) : vf_exp_negative_short(b - max);
    vf_store(e, a);
    vf_store(e + FC_N, b);
    return (sum + a) + b;
}

/* e[begin:n], of 16 bits up to a whole pair of vectors; 1 / sum(e), the sum of e[:begin] being `sum` */
FC_INLINE float softmax_share(fc_dtype t, float *e, const void *x, ptrdiff_t begin, ptrdiff_t n, vf max, vf sum) {
    ptrdiff_t i = begin;
    for (; i + 2 * FC_N <= n; i += 2 * FC_N) sum = softmax_exp(t, e + i, x, i, max, sum);
    for (; t == FC_F32 && i < n; i += FC_N) {
        const ptrdiff_t count = n - i < FC_N ? n - i : FC_N;
        const vf v = vf_fill_from(vf_exp_negative(vf_get_upto(t, x, i, n) - max), count, 0.0f);
        sum += v;
        vf_put_upto(t, e, i, v, n);
    }
    if (t != FC_F32 && i < n) {
        uint16_t last[2 * FC_N];
        softmax_last(t, last, x, i, n);
        sum = softmax_exp(t, e + i, last, 0, max, sum);
    }
    return 1.0f / vf_sum(sum);
}

FC_INLINE void softmax_any(fc_dtype t, void *out, const void *x, float *e, ptrdiff_t n) {
    const vf max = softmax_max(t, x, n);
    softmax_scale(t, out, e, n, vf_set1(softmax_share(t, e, x, 0, n, max, vf_zero())));
}

/* values [begin, end) of a row that waits, less than a few vectors, into the stream */
FC_INLINE void softmax_stream_few(fc_dtype t, struct fc_stream *stream, const struct fc_softmax_row *row,
                                  ptrdiff_t begin, ptrdiff_t end) {
    char some[FC_BYTES];
    const uint16_t *made = (const uint16_t *)(const void *)row->e;
    if (t != FC_F32) stream_put(stream, row->out + begin * 2, made + begin, (end - begin) * 2, NULL);
    for (ptrdiff_t i = begin; t == FC_F32 && i < end; i += FC_N) {
        const ptrdiff_t count = end - i < FC_N ? end - i : FC_N;
        softmax_scale(t, some, row->e + i, count, vf_set1(row->share));
        stream_put(stream, row->out + i * 4, some, count * 4, NULL);
    }
}

/* 2 FC_N values of the row that waits, from i on, where its lines are aligned */
FC_INLINE void softmax_stream(fc_dtype t, const struct fc_softmax_row *row, ptrdiff_t i, vf share) {
    float *out = (float *)(void *)(row->out + i * fc_size_of(t));
    if (t == FC_F32) {
        vf_stream(out, vf_load(row->e + i) * share);
        vf_stream(out + FC_N, vf_load(row->e + i + FC_N) * share);
    } else {
        vf_stream(out, vf_load((const uint16_t *)(const void *)row->e + i));
    }
}

/* e[n] of x, which wait from now on in *row, while the row before goes past the caches; x NULL: there is none. `next`,
 * or NULL: a row that is read after this one. row->out is a multiple of the type's size. */
FC_INLINE void softmax_streamed_any(fc_dtype t, struct fc_stream *stream, struct fc_softmax_row *row, void *out,
                                    const void *x, float *e, ptrdiff_t n, const void *next) {
    const ptrdiff_t size = fc_size_of(t), before = row->out ? n : 0;
    const ptrdiff_t lead = row->out ? (ptrdiff_t)(-(uintptr_t)row->out % FC_BYTES) / size : 0;
    const vf share = vf_set1(row->share), max = x ? softmax_max(t, x, n) : vf_zero();
    vf sum = vf_zero();
    ptrdiff_t done = lead < before ? lead : before, i = 0;
    if (before) softmax_stream_few(t, stream, row, 0, done);
    if (before && stream->end != row->out + done * size) stream_put(stream, row->out + done * size, row->e, 0, NULL);
    for (; x && i + 2 * FC_N <= n; i += 2 * FC_N) {
        sum = softmax_exp(t, e + i, x, i, max, sum);
        for (ptrdiff_t j = 0; next && j < 2 * FC_N * size; j += 64)
            __builtin_prefetch((const char *)next + i * size + j, 0, 2);
        if (done + 2 * FC_N > before) continue;
        softmax_stream(t, row, done, share);
        done += 2 * FC_N;
    }
    for (; done + 2 * FC_N <= before; done += 2 * FC_N) softmax_stream(t, row, done, share);
    if (before) {
        stream->end = row->out + done * size;
        softmax_stream_few(t, stream, row, done, before);
    }
    if (!x) return;
    *row = (struct fc_softmax_row){out, e, softmax_share(t, e, x, i, n, max, sum)};
    if (t != FC_F32) softmax_scale(t, e, e, n, vf_set1(row->share));
}
