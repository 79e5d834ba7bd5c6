/* Large results go past the caches: what no cache keeps until it is read need not be fetched before it is written. That
 * takes whole vectors at aligned addresses, and NumPy's arrays begin anywhere. A row's last bytes, less than a vector,
 * therefore wait for the first ones of the row after it: written the ordinary way, they would fetch their line, and
 * what comes later would wait for that (AVX2, rows of 16 KB: a fifth of the time). Of vectors of 64 bytes less waits:
 * they go in parts of 16, which the processor gathers. What waits is put together in memory, and loading it there waits
 * for all that was stored before, past the caches too. */

enum {
    STREAM_BYTES = 1024, /* a kernel's results between two calls of stream_put: they stay in L1 */
    STREAM_PART = FC_BYTES == 64 ? 16 : FC_BYTES,
};

FC_INLINE void stream_flush(struct fc_stream *p) {
    if (p->waiting) memcpy(p->end - p->waiting, p->bytes, (size_t)p->waiting);
    p->waiting = 0;
}

/* fewer bytes than FC_BYTES from `from` to `to`, where the row before ended if some wait */
FC_INLINE void stream_parts(struct fc_stream *p, char *to, const char *from, ptrdiff_t bytes) {
    ptrdiff_t i = (ptrdiff_t)(-(uintptr_t)to % STREAM_PART);
    if (i > bytes) i = bytes;
    if (p->waiting) {
        memcpy(p->bytes + p->waiting, from, (size_t)i);
        p->waiting += i;
        if (p->waiting == STREAM_PART) {
            vf_stream_part(to + i - STREAM_PART, p->bytes);
            p->waiting = 0;
        }
    } else if (i) {
        memcpy(to, from, (size_t)i);
    }
    if (STREAM_PART < FC_BYTES)
        for (; i + STREAM_PART <= bytes; i += STREAM_PART) vf_stream_part(to + i, from + i);
    if (i < bytes) {
        memcpy(p->bytes, from + i, (size_t)(bytes - i));
        p->waiting = bytes - i;
    }
}

/* bytes from `from` to `out`. next: as many that will soon be read, prefetched on the way, or NULL; they may lie beyond
 * an array's end. The processor's own fetching stops at each page. */
FC_INLINE void stream_put(struct fc_stream *p, void *out, const void *from, ptrdiff_t bytes, const void *next) {
    char *to = out;
    const char *x = from;
    if (p->end != to) stream_flush(p);
    ptrdiff_t i = (ptrdiff_t)(-(uintptr_t)to % FC_BYTES);
    if (i > bytes) i = bytes;
    if (i) stream_parts(p, to, x, i);
    for (; i + 64 <= bytes; i += 64) {
        if (next) __builtin_prefetch((const char *)next + i, 0, 2);
#pragma GCC unroll 4
        for (ptrdiff_t j = 0; j < 64; j += FC_BYTES) vf_stream((float *)(void *)(to + i + j), vf_load(x + i + j));
    }
    for (; i + FC_BYTES <= bytes; i += FC_BYTES) vf_stream((float *)(void *)(to + i), vf_load(x + i));
    if (i < bytes) stream_parts(p, to + i, x + i, bytes - i);
    p->end = to + bytes;
}

/* How many of n values are made next for `out`, in a stage: STREAM_BYTES, before which come, where vectors are of 64
 * bytes, those that lie before the first aligned one. What is loaded from the stage is then what was stored there, and
 * need not wait until older stores have gone past the caches. */
FC_INLINE ptrdiff_t stream_count(const void *out, ptrdiff_t n, ptrdiff_t size) {
    const ptrdiff_t lead = FC_BYTES == 64 ? (ptrdiff_t)(-(uintptr_t)out % FC_BYTES) / size : 0;
    const ptrdiff_t count = lead ? lead : STREAM_BYTES / size;
    return n < count ? n : count;
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
