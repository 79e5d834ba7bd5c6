/* simd.h's backend words for 32-byte vectors: AVX2, FMA, F16C. */
#include <immintrin.h>

FC_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FC_INLINE vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FC_INLINE vf vf_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
FC_INLINE vf vf_sqrt(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }
FC_INLINE vf vf_if_lt(vf a, vf b, vf x, vf y) {
    return (vf)_mm256_blendv_ps((__m256)y, (__m256)x, _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ));
}
FC_INLINE __m256i vf_lanes(ptrdiff_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FC_INLINE vf vf_load_n(const float *p, ptrdiff_t n) { return (vf)_mm256_maskload_ps(p, vf_lanes(n)); }
FC_INLINE void vf_store_n(float *p, vf a, ptrdiff_t n) { _mm256_maskstore_ps(p, vf_lanes(n), (__m256)a); }

FC_INLINE void vf_stream(float *p, vf a) { _mm256_stream_ps(p, (__m256)a); }
FC_INLINE void vf_stream_part(void *p, const void *from) { vf_stream(p, vf_load(from)); }
FC_INLINE void vf_stream_end(void) { _mm_sfence(); }

FC_INLINE vf vf_from_f16(const uint16_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
FC_INLINE void vf_to_f16(uint16_t *p, vf a) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FC_INLINE vf vf_from_bf16(const uint16_t *p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
}
/* The 16 high bits of round-to-nearest-even(a), NaN kept quiet, in each 32-bit lane. */
FC_INLINE __m256i vf_bf16_bits(vf a) {
    __m256i u = (__m256i)a, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    __m256 nan = _mm256_cmp_ps((__m256)a, (__m256)a, _CMP_UNORD_Q);
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32((__m256i)_mm256_blendv_ps((__m256)r, (__m256)quiet, nan), 16);
}
FC_INLINE void vf_to_bf16(uint16_t *p, vf a) {
    __m256i r = vf_bf16_bits(a);
    _mm_storeu_si128((void *)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
#define FC_HAS_PAIR 1
FC_INLINE vf vf_bf16_pair(vf a, vf b) {
    return (vf)_mm256_permute4x64_epi64(_mm256_packus_epi32(vf_bf16_bits(a), vf_bf16_bits(b)), 0xD8);
}
FC_INLINE vf vf_f16_pair(vf a, vf b) {
    const __m128i low = _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i high = _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm256_set_m128i(high, low);
}

/* In two steps, so that 2^n1 and 2^n2 are normal floats for every n that vf_exp makes. */
FC_INLINE vf vf_scale2(vf a, vf n) {
    __m256i i = _mm256_cvtps_epi32((__m256)n), half = _mm256_srai_epi32(i, 1);
    __m256i bias = _mm256_set1_epi32(127);
    __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
    return a * (vf)first * (vf)second;
}

FC_INLINE vf vf_swap(vf a) { return (vf)_mm256_permute_ps((__m256)a, 0xB1); }
FC_INLINE vf vf_dup(const float *p) {
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return (vf)_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), twice);
}

FC_INLINE void vf_transpose(vf r[8]) {
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
    }
    __m256 s[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = (vf)_mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
        r[i + 4] = (vf)_mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
    }
}

FC_INLINE vf vf_add_product(vf acc, vf a, vf b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
    return acc;
}
FC_INLINE vi vi_from_s8(const int8_t *p) { return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)); }
FC_INLINE vi vi_from_u8(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
#define FC_HAS_FROM_I8 1
FC_INLINE vi vi_from_i8(const void *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
FC_INLINE vu vu_look_up(const uint8_t *table, vu i) {
    return (vu)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)), (__m256i)i);
}
FC_INLINE vi vi_madd16(vi a, vi b) { return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
FC_INLINE vi vi_add_madd16(vi acc, vi a, vi b) {
    vi product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
    return acc;
}
#define FC_HAS_MADDUBS 1
FC_INLINE vi vi_maddubs(vi u8, vi s8) { return (vi)_mm256_maddubs_epi16((__m256i)u8, (__m256i)s8); }
FC_INLINE vi vi_add_maddubs(vi acc, vi u8, vi s8) {
    vi product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(u8), "x"(s8));
    return acc;
}
#ifdef FC_HAS_I8_DOT
#ifdef FC_SOFTWARE_AVX512
FC_INLINE vi vi_dot_i8(vi acc, vi u8, vi s8) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)u8, (__m256i)s8);
}
FC_INLINE vi vi_dot_i16(vi acc, vi a, vi b) {
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
}
#else /* {vex}: not the form that AVX-512 has of them */
FC_INLINE vi vi_dot_i8(vi acc, vi u8, vi s8) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u8), "x"(s8));
    return acc;
}
FC_INLINE vi vi_dot_i16(vi acc, vi a, vi b) {
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
    return acc;
}
#endif
#endif
FC_INLINE __m128i vi_packed16(vi a) {
    return _mm_packs_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
}
FC_INLINE void vi_put16(int16_t *p, vi a) { _mm_storeu_si128((void *)p, vi_packed16(a)); }
FC_INLINE void vi_put8(int8_t *p, vi a) {
    __m128i h = vi_packed16(a);
    _mm_storel_epi64((void *)p, _mm_packs_epi16(h, h));
}
#define FC_HAS_PUT8_FOUR 1
FC_INLINE void vi_put8_four(uint8_t *p, const vi v[4]) {
    const __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((void *)p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
}
#define FC_HAS_MAX_UNSIGNED 1
FC_INLINE vu vu_max(vu a, vu b) { return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b); }
