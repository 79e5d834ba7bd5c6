/* simd.h's backend words for the x86-64 baseline: SSE2, no FMA, no F16C. */
#include <emmintrin.h>

#include "narrow.h"

FC_INLINE void vf_stream(float *p, vf a) { _mm_stream_ps(p, (__m128)a); }
FC_INLINE void vf_stream_part(void *p, const void *from) { vf_stream(p, vf_load(from)); }
FC_INLINE void vf_stream_end(void) { _mm_sfence(); }
FC_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
FC_INLINE vf vf_sqrt(vf a) { return (vf)_mm_sqrt_ps((__m128)a); }
FC_INLINE vf vf_max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
FC_INLINE vf vf_min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }

FC_INLINE vu vf_widen16(const uint16_t *p) {
    return (vu)_mm_unpacklo_epi16(_mm_loadl_epi64((const void *)p), _mm_setzero_si128());
}
/* Lanes hold values below 2^16: bring them into the signed range that SSE2 can pack. */
FC_INLINE void vf_narrow16(uint16_t *p, vu a) {
    __m128i s = _mm_srai_epi32(_mm_slli_epi32((__m128i)a, 16), 16);
    _mm_storel_epi64((void *)p, _mm_packs_epi32(s, s));
}

FC_INLINE vf vf_from_bf16(const uint16_t *p) { return (vf)(vf_widen16(p) << 16); }
FC_INLINE void vf_to_bf16(uint16_t *p, vf a) { vf_narrow16(p, vf_bf16_bits(a)); }

/* Exponent and mantissa moved into place are a float 2^112 too small; the product also mends denormals. */
FC_INLINE vf vf_from_f16(const uint16_t *p) {
    vu h = vf_widen16(p), sign = (h & 0x8000) << 16, mag = (h & 0x7fff) << 13;
    vf value = (vf)mag * 0x1p112f;
    vu special = (vu)(mag >= (vu){0x0f800000, 0x0f800000, 0x0f800000, 0x0f800000});
    return (vf)((vu)value | sign | (special & 0x7f800000));
}

/* Rounds by adding a power of two whose last place is the last place of the half: 2^13 ulp above |a|,
 * and never finer than 2^-24, which is where half denormals end. */
FC_INLINE void vf_to_f16(uint16_t *p, vf a) {
    vu u = (vu)a, sign = (u >> 16) & 0x8000, mag = u & 0x7fffffff;
    vu exponent = mag & 0x7f800000, least = (vu){0, 0, 0, 0} + 0x38800000;
    vu small = (vu)(exponent < least);
    vu base = ((least & small) | (exponent & ~small)) + (13u << 23);
    vf rounded = ((vf)mag + (vf)base) - (vf)base;
    vu bits = (vu)(rounded * 0x1p-112f) >> 13;
    vu over = (vu)((vu)rounded >= (vu){0x47800000, 0x47800000, 0x47800000, 0x47800000});
    vu nan = (vu)(a != a);
    bits = (bits & ~over) | (over & 0x7c00);
    bits = (bits & ~nan) | (nan & (0x7e00 | ((mag >> 13) & 0x3ff)));
    vf_narrow16(p, bits | sign);
}

FC_INLINE vf vf_swap(vf a) { return (vf)_mm_shuffle_ps((__m128)a, (__m128)a, 0xB1); }
FC_INLINE vf vf_dup(const float *p) {
    __m128 pair = _mm_castsi128_ps(_mm_loadl_epi64((const void *)p));
    return (vf)_mm_unpacklo_ps(pair, pair);
}

FC_INLINE void vf_transpose(vf r[4]) {
    __m128 a = _mm_unpacklo_ps((__m128)r[0], (__m128)r[1]), b = _mm_unpackhi_ps((__m128)r[0], (__m128)r[1]);
    __m128 c = _mm_unpacklo_ps((__m128)r[2], (__m128)r[3]), d = _mm_unpackhi_ps((__m128)r[2], (__m128)r[3]);
    r[0] = (vf)_mm_movelh_ps(a, c);
    r[1] = (vf)_mm_movehl_ps(c, a);
    r[2] = (vf)_mm_movelh_ps(b, d);
    r[3] = (vf)_mm_movehl_ps(d, b);
}

FC_INLINE vf vf_add_product(vf acc, vf a, vf b) { return vf_fma(a, b, acc); }
FC_INLINE vi vi_from_s8(const int8_t *p) {
    __m128i b = _mm_loadl_epi64((const void *)p);
    return (vi)_mm_srai_epi16(_mm_unpacklo_epi8(b, b), 8);
}
FC_INLINE vi vi_from_u8(const uint8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    __m128i zero = _mm_setzero_si128();
    return (vi)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero);
}
/* SSE2 has no shuffle of bytes: each entry where it is asked for. */
FC_INLINE vu vu_look_up(const uint8_t *table, vu i) {
    __m128i found = _mm_setzero_si128();
    for (int e = 0; e < 16; e++) {
        __m128i here = _mm_cmpeq_epi8((__m128i)i, _mm_set1_epi8((char)e));
        found = _mm_or_si128(found, _mm_and_si128(here, _mm_set1_epi8((char)table[e])));
    }
    return (vu)found;
}
FC_INLINE vi vi_madd16(vi a, vi b) { return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b); }
FC_INLINE vi vi_add_madd16(vi acc, vi a, vi b) { return acc + vi_madd16(a, b); }
FC_INLINE void vi_put16(int16_t *p, vi a) { _mm_storel_epi64((void *)p, _mm_packs_epi32((__m128i)a, (__m128i)a)); }
FC_INLINE void vi_put8(int8_t *p, vi a) {
    __m128i h = _mm_packs_epi32((__m128i)a, (__m128i)a);
    int32_t four = _mm_cvtsi128_si32(_mm_packs_epi16(h, h));
    memcpy(p, &four, 4);
}
