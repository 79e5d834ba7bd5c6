/* Storage types to float32, float32 to storage types, and anything to bfloat16 (round to nearest even). */

FC_INLINE void to_f32_any(fc_dtype t, float *out, const void *x, ptrdiff_t n, float scale) {
    vf s = vf_set1(scale);
    for (ptrdiff_t i = 0; i < n; i += FC_N) vf_put_upto(FC_F32, out, i, vf_get_upto(t, x, i, n) * s, n);
}

FC_INLINE void from_f32_any(fc_dtype t, void *out, const float *x, ptrdiff_t n, float scale) {
    vf s = vf_set1(scale);
    for (ptrdiff_t i = 0; i < n; i += FC_N) vf_put_upto(t, out, i, vf_get_upto(FC_F32, x, i, n) * s, n);
}

FC_INLINE void to_bf16_any(fc_dtype t, uint16_t *out, const void *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) vf_put_upto(FC_BF16, out, i, vf_get_upto(t, x, i, n), n);
}

/* what x would be as bfloat16, in float32 */
FC_INLINE void round_bf16_any(fc_dtype t, float *out, const void *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        uint16_t rounded[FC_N];
        vf_to_bf16(rounded, vf_get_upto(t, x, i, n));
        vf_put_upto(FC_F32, out, i, vf_from_bf16(rounded), n);
    }
}

/* bytes from one place to another past the caches */
static void stream(void *out, const void *from, ptrdiff_t bytes) {
    char *to = out;
    const char *p = from;
    ptrdiff_t i = (ptrdiff_t)(-(uintptr_t)out % FC_BYTES);
    if (i > bytes) i = bytes;
    memcpy(to, p, (size_t)i);
    for (; i + FC_BYTES <= bytes; i += FC_BYTES) vf_stream((float *)(void *)(to + i), vf_load(p + i));
    memcpy(to + i, p + i, (size_t)(bytes - i));
    vf_stream_end();
}
