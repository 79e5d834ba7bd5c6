/* Words that the two 16-byte backends share: partial loads through a buffer, powers of two in integers. */

FC_INLINE vf vf_load_n(const float *p, ptrdiff_t n) {
    float part[FC_N] = {0};
    memcpy(part, p, (size_t)n * 4);
    return vf_load(part);
}

FC_INLINE void vf_store_n(float *p, vf a, ptrdiff_t n) {
    float part[FC_N];
    vf_store(part, a);
    memcpy(p, part, (size_t)n * 4);
}

FC_INLINE vf vf_if_lt(vf a, vf b, vf x, vf y) {
    vi m = a < b;
    return (vf)(((vi)x & m) | ((vi)y & ~m));
}

/* The 16 high bits of round-to-nearest-even(a), NaN kept quiet, in each 32-bit lane. */
FC_INLINE vu vf_bf16_bits(vf a) {
    vu u = (vu)a, r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = (vu)(a != a);
    return (r & ~nan) | (((u >> 16) | 0x40) & nan);
}

FC_INLINE vf vf_scale2(vf a, vf n) {
    vi i = __builtin_convertvector(n, vi), half = i >> 1;
    return a * (vf)((vu)(half + 127) << 23) * (vf)((vu)(i - half + 127) << 23);
}
