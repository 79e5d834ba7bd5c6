/* out = e / sum(e),  e = exp(x - max(x)), which stay in float32 between the passes: e[n], or out itself where it is
 * that and need not go past the caches. There, a row's e wait until those of the next row are made: what that takes to
 * compute and what this takes to write go on together. */

/* out[n] = e share */
FC_INLINE void softmax_scale(fc_dtype t, void *out, const float *e, ptrdiff_t n, vf share) {
    ptrdiff_t i = 0;
    for (; i + 2 * FC_N <= n; i += 2 * FC_N) vf_put2(t, out, i, vf_load(e + i) * share, vf_load(e + i + FC_N) * share);
    for (; i < n; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(FC_F32, e, i, n) * share, n);
}

FC_INLINE vf softmax_max(fc_dtype t, const void *x, ptrdiff_t n) {
    vf top[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) top[j] = vf_set1(-INFINITY);
    ptrdiff_t i = 0;
    for (; i + 4 * FC_N <= n; i += 4 * FC_N)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) top[j] = vf_max(top[j], vf_get(t, x, i + j * FC_N));
    for (; i + FC_N <= n; i += FC_N) top[0] = vf_max(top[0], vf_get(t, x, i));
    if (i < n) top[0] = vf_max(top[0], vf_fill_from(vf_get_n(t, x, i, n - i), n - i, -INFINITY));
    return vf_set1(vf_hmax(vf_max(vf_max(top[0], top[1]), vf_max(top[2], top[3]))));
}

/* e[i:i + FC_N] = exp(x - max); their sum so far */
FC_INLINE vf softmax_exp(fc_dtype t, float *e, const void *x, ptrdiff_t i, vf max, vf sum) {
    const vf v = vf_exp_negative(vf_get(t, x, i) - max);
    vf_store(e + i, v);
    return sum + v;
}

/* e[begin:n]; 1 / sum(e), the sum of e[:begin] being `sum` */
FC_INLINE float softmax_share(fc_dtype t, float *e, const void *x, ptrdiff_t begin, ptrdiff_t n, vf max, vf sum) {
    ptrdiff_t i = begin;
    for (; i + FC_N <= n; i += FC_N) sum = softmax_exp(t, e, x, i, max, sum);
    if (i < n) {
        vf v = vf_fill_from(vf_exp_negative(vf_get_n(t, x, i, n - i) - max), n - i, 0.0f);
        sum += v;
        vf_store_n(e + i, v, n - i);
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
    char some[2 * FC_BYTES];
    for (ptrdiff_t i = begin; i < end; i += FC_N) {
        const ptrdiff_t count = end - i < FC_N ? end - i : FC_N;
        softmax_scale(t, some, row->e + i, count, vf_set1(row->share));
        stream_put(stream, row->out + i * fc_size_of(t), some, count * fc_size_of(t), NULL);
    }
}

/* 2 FC_N values of the row that waits, from i on, where its lines are aligned */
FC_INLINE void softmax_stream(fc_dtype t, const struct fc_softmax_row *row, ptrdiff_t i, vf share) {
    const vf a = vf_load(row->e + i) * share, b = vf_load(row->e + i + FC_N) * share;
    float *out = (float *)(void *)(row->out + i * fc_size_of(t));
    vf_stream(out, t == FC_F32 ? a : vf_halves(t, a, b));
    if (t == FC_F32) vf_stream(out + FC_N, b);
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
        sum = softmax_exp(t, e, x, i, max, sum);
        sum = softmax_exp(t, e, x, i + FC_N, max, sum);
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
    if (x) *row = (struct fc_softmax_row){out, e, softmax_share(t, e, x, i, n, max, sum)};
}
