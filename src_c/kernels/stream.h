/* Large results go past the caches: what no cache keeps until it is read need not be fetched before it is written. That
 * takes whole vectors at aligned addresses, and NumPy's arrays begin anywhere. A row's last bytes, less than a vector,
 * therefore wait for the first ones of the row after it: written the ordinary way, they would fetch their line, and
 * what comes later would wait for that (AVX2, rows of 16 KB: a fifth of the time). */

enum { STREAM_BYTES = 1024 }; /* a kernel's results between two calls of stream_put: they stay in L1 */

FC_INLINE void stream_flush(struct fc_stream *p) {
    if (p->waiting) memcpy(p->end - p->waiting, p->bytes, (size_t)p->waiting);
    p->waiting = 0;
}

/* bytes from `from` to `out`. next: as many that will soon be read, prefetched on the way, or NULL; they may lie beyond
 * an array's end. The processor's own fetching stops at each page. */
FC_INLINE void stream_put(struct fc_stream *p, void *out, const void *from, ptrdiff_t bytes, const void *next) {
    char *to = out;
    const char *x = from;
    if (p->end != to) stream_flush(p);
    ptrdiff_t i = (ptrdiff_t)(-(uintptr_t)to % FC_BYTES);
    if (i > bytes) i = bytes;
    if (p->waiting) {
        memcpy(p->bytes + p->waiting, x, (size_t)i);
        p->waiting += i;
        if (p->waiting == FC_BYTES) {
            vf_stream((float *)(void *)(to + i - FC_BYTES), vf_load(p->bytes));
            p->waiting = 0;
        }
    } else {
        memcpy(to, x, (size_t)i);
    }
    for (; i + 64 <= bytes; i += 64) {
        if (next) __builtin_prefetch((const char *)next + i, 0, 2);
#pragma GCC unroll 4
        for (ptrdiff_t j = 0; j < 64; j += FC_BYTES) vf_stream((float *)(void *)(to + i + j), vf_load(x + i + j));
    }
    for (; i + FC_BYTES <= bytes; i += FC_BYTES) vf_stream((float *)(void *)(to + i), vf_load(x + i));
    if (i < bytes) {
        memcpy(p->bytes, x + i, (size_t)(bytes - i));
        p->waiting = bytes - i;
    }
    p->end = to + bytes;
}

/* Part of a result: `to` is where it was made, out or, if it goes past the caches, a stage of STREAM_BYTES; next: as
 * above */
FC_INLINE void stream_part(struct fc_stream *stream, void *out, const void *to, ptrdiff_t bytes, const void *next) {
    if (stream) stream_put(stream, out, to, bytes, next);
    else
        for (ptrdiff_t i = 0; next && i < bytes; i += 64) __builtin_prefetch((const char *)next + i, 0, 2);
}

static void stream_row(struct fc_stream *stream, void *out, const void *from, ptrdiff_t bytes, const void *next) {
    stream_put(stream, out, from, bytes, next);
}

/* After the last row */
static void stream_end(struct fc_stream *stream) {
    stream_flush(stream);
    vf_stream_end();
}
