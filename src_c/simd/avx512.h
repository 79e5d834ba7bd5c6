/* simd.h's backend words for 64-byte vectors: AVX-512 F, BW, DQ, VL. */
#include <immintrin.h>

#define FC_MASK(n) ((__mmask16)((1u << (n)) - 1u))

FC_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FC_INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FC_INLINE vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
FC_INLINE vf vf_sqrt(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }
FC_INLINE vf vf_if_lt(vf a, vf b, vf x, vf y) {
    return (vf)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512)y, (__m512)x);
}
FC_INLINE vf vf_load_n(const float *p, ptrdiff_t n) { return (vf)_mm512_maskz_loadu_ps(FC_MASK(n), p); }
FC_INLINE void vf_store_n(float *p, vf a, ptrdiff_t n) { _mm512_mask_storeu_ps(p, FC_MASK(n), (__m512)a); }

FC_INLINE void vf_stream(float *p, vf a) { _mm512_stream_ps(p, (__m512)a); }
FC_INLINE void vf_stream_part(void *p, const void *from) { _mm_stream_ps(p, _mm_loadu_ps(from)); }
FC_INLINE void vf_stream_end(void) { _mm_sfence(); }

FC_INLINE vf vf_from_f16(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
FC_INLINE void vf_to_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FC_INLINE vf vf_from_bf16(const uint16_t *p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
}
FC_INLINE vi vi_madd16(vi a, vi b) { return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
FC_INLINE vi vi_from_s8(const int8_t *p) { return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p)); }
FC_INLINE vi vi_from_u8(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
#define FC_HAS_FROM_I8 1
FC_INLINE vi vi_from_i8(const void *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
FC_INLINE vu vu_look_up(const uint8_t *table, vu i) {
    return (vu)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)), (__m512i)i);
}
/* bfloat16 in the upper half of each lane. Round to nearest even in integers: vcvtneps2bf16 would flush denormals, and
 * other ISAs would not. */
FC_INLINE __m512i vf_bf16_bits(vf a) {
    const __m512i u = (__m512i)a, quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q);
    const __mmask16 odd = _mm512_mask_test_epi32_mask(number, u, _mm512_set1_epi32(0x10000));
    const __m512i r = _mm512_mask_add_epi32(quiet, number, u, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(r, odd, u, _mm512_set1_epi32(0x8000));
}
FC_INLINE void vf_to_bf16(uint16_t *p, vf a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(vf_bf16_bits(a), 16)));
}
#define FC_HAS_PAIR 1
FC_INLINE vf vf_bf16_pair(vf a, vf b) {
    const vu16 upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (vf)_mm512_permutex2var_epi16(vf_bf16_bits(a), (__m512i)upper, vf_bf16_bits(b));
}
#if defined(FC_HAS_BF16_DOT) || defined(FC_HAS_TILES)
#define FC_HAS_BF16_PAIR 1
FC_INLINE vf vf_bf16_pair_flushed(vf a, vf b) { return (vf)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
#endif
FC_INLINE vf vf_f16_pair(vf a, vf b) {
    const __m512i halves = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const __m256i low = _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i high = _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm512_permutex2var_ps(_mm512_castps256_ps512((__m256)low), halves,
                                      _mm512_castps256_ps512((__m256)high));
}

#define FC_HAS_SCALE 1
FC_INLINE vf vf_off_integer(vf a) {
    return (vf)_mm512_reduce_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FC_INLINE vf vf_scale_from(vf a, vf n, vf x, vf least) {
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(kept, (__m512)a, (__m512)n);
}
#define FC_HAS_RECIPROCAL_SHORT 1
FC_INLINE vf vf_reciprocal_short(vf a) { return (vf)_mm512_rcp14_ps((__m512)a); }
#define FC_HAS_LOOK_UP_32 1
FC_INLINE vf vf_look_up_32(const void *table, vu i) {
    const __m512 *t = table;
    return (vf)_mm512_permutex2var_ps(t[0], (__m512i)i, t[1]);
}
FC_INLINE vf vf_product_from(vf a, vf b, vf x, vf least) {
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ);
    return (vf)_mm512_maskz_mul_ps(kept, (__m512)a, (__m512)b);
}
FC_INLINE vf vf_scale2(vf a, vf n) { return (vf)_mm512_scalef_ps((__m512)a, (__m512)n); }

FC_INLINE vf vf_swap(vf a) { return (vf)_mm512_permute_ps((__m512)a, 0xB1); }
FC_INLINE vf vf_dup(const float *p) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return (vf)_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}

/* Pairs of rows, then pairs of pairs inside 128-bit lanes, then the lanes themselves. */
FC_INLINE void vf_transpose(vf r[16]) {
    __m512 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = (vf)_mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = (vf)_mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = (vf)_mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = (vf)_mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4((__m512)r[i], (__m512)r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4((__m512)r[i], (__m512)r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_f32x4((__m512)r[i + 8], (__m512)r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4((__m512)r[i + 8], (__m512)r[i + 12], 0xDD);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = (vf)_mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = (vf)_mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = (vf)_mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = (vf)_mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

/* Quarters of rows i, i + 4, i + 8, i + 12 meet in one register on their way in, so that only shuffles inside 128-bit
 * lanes are left: half of those that vf_transpose needs. */
#define FC_HAS_LOAD_TRANSPOSED
FC_INLINE void vf_load_transposed(vf r[16], const char *p, ptrdiff_t ld) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        __m512 z[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const char *row = p + i * ld + g * 16;
            z[i] = _mm512_castps128_ps512(_mm_loadu_ps((const float *)(const void *)row));
            z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x00f0, _mm_loadu_ps((const float *)(const void *)(row + 4 * ld)));
            z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x0f00, _mm_loadu_ps((const float *)(const void *)(row + 8 * ld)));
            z[i] =
                _mm512_mask_broadcast_f32x4(z[i], 0xf000, _mm_loadu_ps((const float *)(const void *)(row + 12 * ld)));
        }
        __m512 a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
        __m512 c = _mm512_unpacklo_ps(z[2], z[3]), d = _mm512_unpackhi_ps(z[2], z[3]);
        r[4 * g] = (vf)_mm512_shuffle_ps(a, c, 0x44);
        r[4 * g + 1] = (vf)_mm512_shuffle_ps(a, c, 0xEE);
        r[4 * g + 2] = (vf)_mm512_shuffle_ps(b, d, 0x44);
        r[4 * g + 3] = (vf)_mm512_shuffle_ps(b, d, 0xEE);
    }
}

#define FC_HAS_MADDUBS 1
FC_INLINE vi vi_maddubs(vi u8, vi s8) { return (vi)_mm512_maddubs_epi16((__m512i)u8, (__m512i)s8); }
#ifdef FC_SOFTWARE_AVX512 /* tools/check_avx512.sh has no such registers: the same words in intrinsics */
FC_INLINE vf vf_add_product(vf acc, vf a, vf b) { return vf_fma(a, b, acc); }
FC_INLINE vi vi_add_madd16(vi acc, vi a, vi b) { return acc + vi_madd16(a, b); }
FC_INLINE vi vi_add_maddubs(vi acc, vi u8, vi s8) {
    return (vi)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)u8, (__m512i)s8));
}
FC_INLINE vf vf_dot_bf16(vf acc, vu w, vu x) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x); }
FC_INLINE vi vi_dot_i8(vi acc, vi u8, vi s8) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u8, (__m512i)s8); }
FC_INLINE vi vi_dot_i16(vi acc, vi a, vi b) { return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
#else
FC_INLINE vf vf_add_product(vf acc, vf a, vf b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
FC_INLINE vi vi_add_madd16(vi acc, vi a, vi b) {
    vi product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(a), "v"(b));
    return acc;
}
FC_INLINE vi vi_add_maddubs(vi acc, vi u8, vi s8) {
    vi product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(u8), "v"(s8));
    return acc;
}
#ifdef FC_HAS_BF16_DOT
FC_INLINE vf vf_dot_bf16(vf acc, vu w, vu x) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}
#endif
#ifdef FC_HAS_I8_DOT
FC_INLINE vi vi_dot_i8(vi acc, vi u8, vi s8) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
    return acc;
}
FC_INLINE vi vi_dot_i16(vi acc, vi a, vi b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
#endif
#endif

FC_INLINE void vi_put16(int16_t *p, vi a) { _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16((__m512i)a)); }
FC_INLINE void vi_put8(int8_t *p, vi a) { _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8((__m512i)a)); }
#ifndef FC_SOFTWARE_AVX512
#define FC_HAS_MAX_UNSIGNED 1
FC_INLINE vu vu_max(vu a, vu b) { return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b); }
#define FC_HAS_PUT8_FOUR 1
FC_INLINE void vi_put8_four(uint8_t *p, const vi v[4]) {
    const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
    const __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512((void *)p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}
#endif
