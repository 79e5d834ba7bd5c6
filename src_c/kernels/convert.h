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
