/* AVX-512, and AVX-VNNI, in software: the intrinsics that src_c may use, one lane at a time in plain C, so that tables of
 * both run, slowly, on a CPU that has only AVX2. With this folder first on the include path, FC_SOFTWARE_AVX512 defined,
 * and gcc; tools/check_avx512.sh does it all, and check.c, beside this, proves these functions.
 * Each line is the Operation section of Intel's manual. A name that is missing here does not compile: the compiler's own
 * intrinsic wants a target that this build never asks for. Give it a line, a #define below, and one in check.c.
 * Left open, as the intrinsics leave it: which NaN comes out of an addition or a product of several. */
#pragma GCC system_header /* the names are redefined on purpose, and some are macros already */
#ifndef FC_AVX512_IN_SOFTWARE
#define FC_AVX512_IN_SOFTWARE
#include_next <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Not always_inline: the tables would take gcc three times as long. */
#define SOFT_INLINE static inline __attribute__((unused, target("avx2,fma,f16c")))

typedef float soft_f32 __attribute__((vector_size(64)));
typedef int32_t soft_i32 __attribute__((vector_size(64)));
typedef uint32_t soft_u32 __attribute__((vector_size(64)));
typedef int16_t soft_i16 __attribute__((vector_size(64)));
typedef uint16_t soft_u16 __attribute__((vector_size(64)));
typedef int8_t soft_i8 __attribute__((vector_size(64)));
typedef uint8_t soft_u8 __attribute__((vector_size(64)));
typedef uint64_t soft_u64 __attribute__((vector_size(64)));
typedef int16_t soft_i16x16 __attribute__((vector_size(32)));
typedef uint16_t soft_u16x16 __attribute__((vector_size(32)));
typedef int8_t soft_i8x32 __attribute__((vector_size(32)));
typedef uint8_t soft_u8x32 __attribute__((vector_size(32)));
typedef int8_t soft_i8x16 __attribute__((vector_size(16)));
typedef uint8_t soft_u8x16 __attribute__((vector_size(16)));
#define F32(a) ((soft_f32)(a))
#define I32(a) ((soft_i32)(a))
#define U32(a) ((soft_u32)(a))
#define I16(a) ((soft_i16)(a))
#define U16(a) ((soft_u16)(a))
#define I8(a) ((soft_i8)(a))
#define U8(a) ((soft_u8)(a))
#define U64(a) ((soft_u64)(a))

/* An intrinsic whose lane i is `lane`. */
#define SOFT(type, lanes, name, params, lane)                                                                          \
    SOFT_INLINE type soft_##name params {                                                                              \
        lanes r;                                                                                                       \
        for (int i = 0; i < (int)(sizeof r / sizeof r[0]); i++) r[i] = lane;                                           \
        return (type)r;                                                                                                \
    }
#define SOFT_CLAMP(x, low, high) ((x) < (low) ? (low) : (x) > (high) ? (high) : (x))
#define SOFT_BIT(k) ((k) >> i & 1)
/* a where the whole of lane i lies in the lower half of its 128 bits, of n lanes, b elsewhere */
#define SOFT_FIRST(n, a, b) (i % (n) < (n) / 2 ? (a) : (b))

/* ---- memory: a masked form touches the lanes of its mask and no others ---- */

SOFT_INLINE __m512i soft_loadu(const void *p) {
    __m512i a;
    memcpy(&a, p, 64);
    return a;
}
SOFT_INLINE void soft_storeu(void *p, __m512i a) { memcpy(p, &a, 64); }
SOFT_INLINE void soft_stream_ps(void *p, __m512 a) {
    if ((uintptr_t)p % 64) __builtin_trap(); /* as the instruction would */
    memcpy(p, &a, 64);
}
SOFT_INLINE void soft_mask_storeu_ps(void *p, __mmask16 k, __m512 a) {
    for (int i = 0; i < 16; i++)
        if (SOFT_BIT(k)) memcpy((char *)p + 4 * i, (const char *)&a + 4 * i, 4);
}
SOFT_INLINE __m512 soft_maskz_loadu_ps(__mmask16 k, const void *p) {
    __m512 a = {0};
    for (int i = 0; i < 16; i++)
        if (SOFT_BIT(k)) memcpy((char *)&a + 4 * i, (const char *)p + 4 * i, 4);
    return a;
}

/* ---- lanes moved, chosen, made equal ---- */

SOFT(__m512, soft_f32, set1_ps, (float a), a)
SOFT(__m512i, soft_i32, set1_epi32, (int a), a)
SOFT(__m512i, soft_i16, set1_epi16, (short a), a)
SOFT(__m512i, soft_i8, set1_epi8, (char a), (int8_t)a)
SOFT(__m512, soft_f32, castps128, (__m128 a), i < 4 ? a[i] : 0.0f) /* zeros: as good as any undefined */
SOFT(__m512, soft_f32, castps256, (__m256 a), i < 8 ? a[i] : 0.0f)
SOFT(__m512, soft_f32, unpacklo_ps, (__m512 a, __m512 b), (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2])
SOFT(__m512, soft_f32, unpackhi_ps, (__m512 a, __m512 b), (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2 + 2])
SOFT(__m512, soft_f32, permute_ps, (__m512 a, int imm), a[i / 4 * 4 + (imm >> i % 4 * 2 & 3)])
SOFT(__m512, soft_f32, shuffle_ps, (__m512 a, __m512 b, int imm),
     SOFT_FIRST(4, a, b)[i / 4 * 4 + (imm >> i % 4 * 2 & 3)])
SOFT(__m512, soft_f32, shuffle_f32x4, (__m512 a, __m512 b, int imm),
     SOFT_FIRST(16, a, b)[(imm >> i / 4 * 2 & 3) * 4 + i % 4])
SOFT(__m512, soft_f32, permutexvar_ps, (__m512i at, __m512 a), a[I32(at)[i] & 15])
SOFT(__m512, soft_f32, permutex2var_ps, (__m512 a, __m512i at, __m512 b),
     (I32(at)[i] & 16 ? b : a)[I32(at)[i] & 15])
SOFT(__m512i, soft_u16, permutex2var_epi16, (__m512i a, __m512i at, __m512i b),
     (U16(at)[i] & 32 ? U16(b) : U16(a))[U16(at)[i] & 31])
SOFT(__m512, soft_f32, mask_broadcast_f32x4, (__m512 from, __mmask16 k, __m128 a), SOFT_BIT(k) ? a[i % 4] : from[i])
SOFT(__m512i, soft_i8, broadcast_i32x4, (__m128i a), ((soft_i8x16)a)[i % 16])
SOFT(__m512, soft_f32, mask_blend_ps, (__mmask16 k, __m512 a, __m512 b), SOFT_BIT(k) ? b[i] : a[i])

/* ---- float32 ---- */

SOFT(__m512, soft_f32, fmadd_ps, (__m512 a, __m512 b, __m512 c), __builtin_fmaf(a[i], b[i], c[i]))
SOFT(__m512, soft_f32, maskz_mul_ps, (__mmask16 k, __m512 a, __m512 b), SOFT_BIT(k) ? a[i] * b[i] : 0.0f)
SOFT(__m512, soft_f32, max_ps, (__m512 a, __m512 b), a[i] > b[i] ? a[i] : b[i])
SOFT(__m512, soft_f32, min_ps, (__m512 a, __m512 b), a[i] < b[i] ? a[i] : b[i])
SOFT(__m512, soft_f32, sqrt_ps, (__m512 a), __builtin_sqrtf(a[i]))
SOFT(__m512, soft_i32, abs_ps, (__m512 a), I32(a)[i] & INT32_MAX)

/* For the 16 predicates (the other 16 differ in the exceptions they raise): which of <, =, >, unordered are true. */
SOFT_INLINE __mmask16 soft_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    static const uint8_t truth[16] = {2, 1, 3, 8, 13, 14, 12, 7, 10, 9, 11, 0, 5, 6, 4, 15};
    unsigned k = 0;
    for (int i = 0; i < 16; i++) {
        int relation = a[i] < b[i] ? 1 : a[i] == b[i] ? 2 : a[i] > b[i] ? 4 : 8;
        k |= (unsigned)((truth[predicate & 15] & relation) != 0) << i;
    }
    return (__mmask16)k;
}

/* a * 2^floor(b). In double the product is exact, so the conversion is its one rounding. The special cases are those of
 * the manual's table: a NaN a, if quiet, yields to an infinite b; 0 * 2^inf and inf * 2^-inf are NaN. */
SOFT_INLINE float soft_scalef(float a, float b) {
    uint32_t bits;
    memcpy(&bits, &a, 4);
    if (isnan(a) && isinf(b) && bits & 0x400000) return b > 0 ? b : 0.0f;
    if (isnan(a)) return a + a;
    if (isnan(b)) return b + b;
    if (isinf(b)) return a * (b > 0 ? b : 0.0f);
    uint64_t power = (uint64_t)(1023 + (int)SOFT_CLAMP(floorf(b), -400.0f, 400.0f)) << 52;
    double scale;
    memcpy(&scale, &power, 8);
    return (float)(a * scale);
}
SOFT(__m512, soft_f32, scalef_ps, (__m512 a, __m512 b), soft_scalef(a[i], b[i]))

SOFT(__m512, soft_f32, maskz_scalef_ps, (__mmask16 k, __m512 a, __m512 b), SOFT_BIT(k) ? soft_scalef(a[i], b[i]) : 0.0f)

/* Processors' own are within 2^-14 of this. */
SOFT(__m512, soft_f32, rcp14_ps, (__m512 a), 1.0f / a[i])

/* a less the nearest integer, ties to even; the manual has 0 for infinity. Other modes are not ours. */
SOFT(__m512, soft_f32, reduce_ps, (__m512 a, int imm), ((void)imm, isinf(a[i]) ? 0.0f : a[i] - __builtin_rintf(a[i])))

SOFT_INLINE float soft_reduce_add_ps(__m512 a) {
    float s[16];
    memcpy(s, &a, 64);
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
}

/* vdpbf16ps: two fused products, the odd one first, each with denormals read as zeros, rounded to nearest even, and
 * flushed if still denormal after rounding to 24 bits of any exponent, in which 2^-126 (1 - 2^-25) is the first
 * number that is not. fmaf has rounded it on a coarser grid; near there the sum of 16-bit products is exact in double. */
SOFT(soft_f32, soft_u32, flush, (soft_u32 a), a[i] & (a[i] << 1 < 0x1000000 ? 0x80000000 : 0xffffffff))
SOFT_INLINE soft_f32 soft_fma_flush(soft_f32 a, soft_f32 b, soft_f32 c) {
    soft_f32 r;
    int small = 0;
    for (int i = 0; i < 16; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    for (int i = 0; i < 16; i++) small |= __builtin_fabsf(r[i]) <= 0x1p-126f;
    if (small)
        for (int i = 0; i < 16; i++)
            if (__builtin_fabsf(r[i]) <= 0x1p-126f && __builtin_fabs((double)a[i] * b[i] + c[i]) < 0x1p-126 - 0x1p-151)
                r[i] = __builtin_copysignf(0.0f, r[i]);
    return r;
}
SOFT_INLINE __m512 soft_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
    soft_f32 r = soft_fma_flush(soft_flush(U32(a) & 0xffff0000), soft_flush(U32(b) & 0xffff0000), soft_flush(U32(c)));
    return (__m512)soft_fma_flush(soft_flush(U32(a) << 16), soft_flush(U32(b) << 16), r);
}

/* vcvtne2ps2bf16: b below, a above, rounded to nearest even; denormals count as 0, a NaN becomes quiet. */
SOFT_INLINE uint16_t soft_to_bf16(uint32_t u) {
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    if ((u & 0x7f800000) == 0) return (uint16_t)(u >> 16 & 0x8000);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
SOFT(__m512bh, soft_u16, cvtne2ps_pbh, (__m512 a, __m512 b), soft_to_bf16(i < 16 ? U32(b)[i & 15] : U32(a)[i & 15]))

/* ---- integers ---- */

SOFT(__m512i, soft_u32, add_epi32, (__m512i a, __m512i b), U32(a)[i] + U32(b)[i])
SOFT(__m512i, soft_u32, sub_epi32, (__m512i a, __m512i b), U32(a)[i] - U32(b)[i])
SOFT(__m512i, soft_u32, mullo_epi32, (__m512i a, __m512i b), U32(a)[i] * U32(b)[i])
SOFT(__m512i, soft_u16, add_epi16, (__m512i a, __m512i b), (uint16_t)(U16(a)[i] + U16(b)[i]))
SOFT(__m512i, soft_u16, sub_epi16, (__m512i a, __m512i b), (uint16_t)(U16(a)[i] - U16(b)[i]))
SOFT(__m512i, soft_u8, add_epi8, (__m512i a, __m512i b), (uint8_t)(U8(a)[i] + U8(b)[i]))
SOFT(__m512i, soft_u8, sub_epi8, (__m512i a, __m512i b), (uint8_t)(U8(a)[i] - U8(b)[i]))
SOFT(__m512i, soft_u64, and_si512, (__m512i a, __m512i b), U64(a)[i] & U64(b)[i])
SOFT(__m512i, soft_u64, or_si512, (__m512i a, __m512i b), U64(a)[i] | U64(b)[i])
SOFT(__m512i, soft_u64, xor_si512, (__m512i a, __m512i b), U64(a)[i] ^ U64(b)[i])
SOFT(__m512i, soft_u32, mask_or_epi32, (__m512i from, __mmask16 k, __m512i a, __m512i b),
     SOFT_BIT(k) ? U32(a)[i] | U32(b)[i] : U32(from)[i])
SOFT(__m512i, soft_u32, mask_add_epi32, (__m512i from, __mmask16 k, __m512i a, __m512i b),
     SOFT_BIT(k) ? U32(a)[i] + U32(b)[i] : U32(from)[i])
SOFT_INLINE __mmask16 soft_mask_test_epi32_mask(__mmask16 k, __m512i a, __m512i b) {
    unsigned found = 0;
    for (int i = 0; i < 16; i++) found |= (unsigned)((U32(a)[i] & U32(b)[i]) != 0) << i;
    return (__mmask16)(found & k);
}
SOFT(__m512i, soft_u32, srli_epi32, (__m512i a, unsigned n), n > 31 ? 0 : U32(a)[i] >> n)
SOFT(__m512i, soft_u32, slli_epi32, (__m512i a, unsigned n), n > 31 ? 0 : U32(a)[i] << n)
SOFT(__m512i, soft_i32, srai_epi32, (__m512i a, unsigned n), I32(a)[i] >> (n > 31 ? 31 : n))
SOFT(__m512i, soft_u16, srli_epi16, (__m512i a, unsigned n), (uint16_t)(n > 15 ? 0 : U16(a)[i] >> n))
SOFT(__m512i, soft_u16, slli_epi16, (__m512i a, unsigned n), (uint16_t)(n > 15 ? 0 : U16(a)[i] << n))
SOFT(__m512i, soft_i8, shuffle_epi8, (__m512i a, __m512i at),
     (int8_t)(I8(at)[i] < 0 ? 0 : I8(a)[i / 16 * 16 + (I8(at)[i] & 15)]))

/* Products are exact; only two of -32768 * -32768 wrap, to INT32_MIN. */
SOFT(__m512i, soft_u32, madd_epi16, (__m512i a, __m512i b),
     (uint32_t)(I16(a)[2 * i] * I16(b)[2 * i]) + (uint32_t)(I16(a)[2 * i + 1] * I16(b)[2 * i + 1]))
SOFT(__m512i, soft_i16, maddubs_epi16, (__m512i a, __m512i b),
     (int16_t)SOFT_CLAMP(U8(a)[2 * i] * I8(b)[2 * i] + U8(a)[2 * i + 1] * I8(b)[2 * i + 1], INT16_MIN, INT16_MAX))
SOFT(__m512i, soft_u32, dpwssd_epi32, (__m512i c, __m512i a, __m512i b),
     U32(c)[i] + (uint32_t)(I16(a)[2 * i] * I16(b)[2 * i]) + (uint32_t)(I16(a)[2 * i + 1] * I16(b)[2 * i + 1]))
SOFT(__m512i, soft_u32, dpbusd_epi32, (__m512i c, __m512i a, __m512i b),
     U32(c)[i] + (uint32_t)(U8(a)[4 * i] * I8(b)[4 * i] + U8(a)[4 * i + 1] * I8(b)[4 * i + 1] +
                            U8(a)[4 * i + 2] * I8(b)[4 * i + 2] + U8(a)[4 * i + 3] * I8(b)[4 * i + 3]))

/* AVX-VNNI: the same in 256 bits */
SOFT_INLINE __m256i soft_lower(__m512i a) {
    __m256i half;
    memcpy(&half, &a, 32);
    return half;
}
SOFT_INLINE __m512i soft_wide(__m256i a) {
    __m512i wide = {0};
    memcpy(&wide, &a, 32);
    return wide;
}
SOFT_INLINE __m256i soft_dpbusd_avx_epi32(__m256i c, __m256i a, __m256i b) {
    return soft_lower(soft_dpbusd_epi32(soft_wide(c), soft_wide(a), soft_wide(b)));
}
SOFT_INLINE __m256i soft_dpwssd_avx_epi32(__m256i c, __m256i a, __m256i b) {
    return soft_lower(soft_dpwssd_epi32(soft_wide(c), soft_wide(a), soft_wide(b)));
}

SOFT_INLINE int soft_reduce_add_epi32(__m512i a) {
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += U32(a)[i];
    return (int)sum;
}

/* ---- one width to another ---- */

SOFT(__m512i, soft_i32, cvtepu16_epi32, (__m256i a), ((soft_u16x16)a)[i])
SOFT(__m512i, soft_i32, cvtepi16_epi32, (__m256i a), ((soft_i16x16)a)[i])
SOFT(__m512i, soft_i32, cvtepu8_epi32, (__m128i a), ((soft_u8x16)a)[i])
SOFT(__m512i, soft_i32, cvtepi8_epi32, (__m128i a), ((soft_i8x16)a)[i])
SOFT(__m512i, soft_i16, cvtepu8_epi16, (__m256i a), ((soft_u8x32)a)[i])
SOFT(__m512i, soft_i16, cvtepi8_epi16, (__m256i a), ((soft_i8x32)a)[i])
SOFT(__m256i, soft_u16x16, cvtepi32_epi16, (__m512i a), (uint16_t)U32(a)[i])
SOFT(__m128i, soft_u8x16, cvtepi32_epi8, (__m512i a), (uint8_t)U32(a)[i])
SOFT(__m256i, soft_u8x32, cvtepi16_epi8, (__m512i a), (uint8_t)U16(a)[i])
SOFT(__m128i, soft_i8x16, cvtsepi32_epi8, (__m512i a), (int8_t)SOFT_CLAMP(I32(a)[i], INT8_MIN, INT8_MAX))
SOFT(__m256i, soft_i16x16, cvtsepi32_epi16, (__m512i a), (int16_t)SOFT_CLAMP(I32(a)[i], INT16_MIN, INT16_MAX))
SOFT(__m256i, soft_i8x32, cvtsepi16_epi8, (__m512i a), (int8_t)SOFT_CLAMP(I16(a)[i], INT8_MIN, INT8_MAX))
SOFT(__m128i, soft_u8x16, cvtusepi32_epi8, (__m512i a), (uint8_t)SOFT_CLAMP(U32(a)[i], 0u, UINT8_MAX))
SOFT(__m256i, soft_u16x16, cvtusepi32_epi16, (__m512i a), (uint16_t)SOFT_CLAMP(U32(a)[i], 0u, UINT16_MAX))
SOFT(__m256i, soft_u8x32, cvtusepi16_epi8, (__m512i a), (uint8_t)SOFT_CLAMP(U16(a)[i], 0, UINT8_MAX))
SOFT(__m512i, soft_i16, packs_epi32, (__m512i a, __m512i b),
     (int16_t)SOFT_CLAMP(SOFT_FIRST(8, I32(a), I32(b))[i / 8 * 4 + i % 4], INT16_MIN, INT16_MAX))
SOFT(__m512i, soft_u16, packus_epi32, (__m512i a, __m512i b),
     (uint16_t)SOFT_CLAMP(SOFT_FIRST(8, I32(a), I32(b))[i / 8 * 4 + i % 4], 0, UINT16_MAX))
SOFT(__m512i, soft_i8, packs_epi16, (__m512i a, __m512i b),
     (int8_t)SOFT_CLAMP(SOFT_FIRST(16, I16(a), I16(b))[i / 16 * 8 + i % 8], INT8_MIN, INT8_MAX))
SOFT(__m512i, soft_u8, packus_epi16, (__m512i a, __m512i b),
     (uint8_t)SOFT_CLAMP(SOFT_FIRST(16, I16(a), I16(b))[i / 16 * 8 + i % 8], 0, UINT8_MAX))

SOFT(__m512, soft_f32, cvtepi32_ps, (__m512i a), (float)I32(a)[i])
/* In the current rounding mode; what does not fit, NaN too, is INT32_MIN. */
SOFT(__m512i, soft_i32, cvtps_epi32, (__m512 a),
     a[i] >= -0x1p31f && a[i] < 0x1p31f ? (int32_t)nearbyintf(a[i]) : INT32_MIN)
SOFT(__m512i, soft_i32, cvttps_epi32, (__m512 a), a[i] >= -0x1p31f && a[i] < 0x1p31f ? (int32_t)a[i] : INT32_MIN)

/* Half floats by F16C. Macros, since its rounding is part of the instruction. */
typedef union {
    __m512 ps;
    __m256 half[2];
} soft_halves_ps;
typedef union {
    __m256i si;
    __m128i half[2];
} soft_halves_si;
#define soft_cvtps_ph(a, rounding)                                                                                     \
    (__extension__({                                                                                                   \
        soft_halves_ps whole = {a};                                                                                    \
        ((soft_halves_si){.half = {_mm256_cvtps_ph(whole.half[0], rounding),                                           \
                                   _mm256_cvtps_ph(whole.half[1], rounding)}}).si;                                     \
    }))
SOFT_INLINE __m512 soft_cvtph_ps(__m256i a) {
    soft_halves_si whole = {a};
    return ((soft_halves_ps){.half = {_mm256_cvtph_ps(whole.half[0]), _mm256_cvtph_ps(whole.half[1])}}).ps;
}

/* ---- tiles: what src_c/simd/amx.h asks for, of a thread's own eight. A tile has the rows and bytes that its shape says;
 * the rest of it is zero. Shapes that the instruction refuses end the program here, as they do there. ---- */

typedef struct {
    uint8_t b[16][64];
} soft_tile;
static _Thread_local soft_tile soft_tiles[8];
static _Thread_local int soft_tile_rows[8], soft_tile_bytes[8];

SOFT_INLINE void soft_tiles_begin(const uint16_t *row_bytes, const uint8_t *rows) {
    for (int t = 0; t < 8; t++) {
        soft_tile_rows[t] = rows[t], soft_tile_bytes[t] = row_bytes[t];
        if (!rows[t] != !row_bytes[t] || rows[t] > 16 || row_bytes[t] > 64) __builtin_trap();
    }
    memset(soft_tiles, 0, sizeof soft_tiles);
}
SOFT_INLINE void soft_tiles_end(void) { memset(soft_tile_rows, 0, sizeof soft_tile_rows); }
SOFT_INLINE void soft_tile_zero(int t) {
    if (!soft_tile_rows[t]) __builtin_trap();
    memset(&soft_tiles[t], 0, sizeof(soft_tile));
}
SOFT_INLINE void soft_tile_load(int t, const void *p, ptrdiff_t ld) {
    soft_tile_zero(t);
    for (int i = 0; i < soft_tile_rows[t]; i++)
        memcpy(soft_tiles[t].b[i], (const char *)p + i * ld, (size_t)soft_tile_bytes[t]);
}
SOFT_INLINE void soft_tile_store(int t, void *p, ptrdiff_t ld) {
    if (!soft_tile_rows[t]) __builtin_trap();
    for (int i = 0; i < soft_tile_rows[t]; i++)
        memcpy((char *)p + i * ld, soft_tiles[t].b[i], (size_t)soft_tile_bytes[t]);
}
/* c = m x n of float32 or int32, a = m x k, b = k x n, of 4 bytes each; no two the same */
SOFT_INLINE void soft_tile_check(int c, int a, int b) {
    if (c == a || c == b || a == b || !soft_tile_rows[c] || soft_tile_rows[a] != soft_tile_rows[c] ||
        soft_tile_bytes[b] != soft_tile_bytes[c] || soft_tile_bytes[a] != soft_tile_rows[b] * 4)
        __builtin_trap();
}

/* tdpbf16ps: even values in one chain of fused products from 0, odd ones in another; the two are added, then c. */
SOFT_INLINE void soft_tile_dot_bf16(int c, int a, int b) {
    soft_tile_check(c, a, b);
    const soft_f32 one = (soft_f32){0} + 1.0f;
    for (int i = 0; i < soft_tile_rows[c]; i++) {
        soft_f32 even = {0}, odd = {0};
        soft_u32 row;
        for (int k = 0; k < soft_tile_rows[b]; k++) {
            soft_u32 pair, x;
            uint32_t both;
            memcpy(&pair, soft_tiles[b].b[k], 64);
            memcpy(&both, soft_tiles[a].b[i] + 4 * k, 4);
            x = (soft_u32){0} + both;
            even = soft_fma_flush(soft_flush(x << 16), soft_flush(pair << 16), even);
            odd = soft_fma_flush(soft_flush(x & 0xffff0000), soft_flush(pair & 0xffff0000), odd);
        }
        memcpy(&row, soft_tiles[c].b[i], 64);
        row = (soft_u32)soft_fma_flush(soft_fma_flush(even, one, odd), one, soft_flush(row));
        memcpy(soft_tiles[c].b[i], &row, (size_t)soft_tile_bytes[c]);
    }
}

/* tdpbssd, tdpbsud and tdpbusd: bytes of a times bytes of b, each less 256 where its bit `sign` is set, summed in int32,
 * which may wrap */
SOFT_INLINE int soft_byte(uint8_t byte, int sign) { return byte - 2 * (byte & sign); }
SOFT_INLINE void soft_tile_dot_bytes(int c, int a, int b, int sign_a, int sign_b) {
    soft_tile_check(c, a, b);
    for (int i = 0; i < soft_tile_rows[c]; i++) {
        uint32_t sum[16];
        memcpy(sum, soft_tiles[c].b[i], 64);
        for (int j = 0; j < soft_tile_bytes[c] / 4; j++)
            for (int k = 0; k < soft_tile_rows[b] * 4; k++)
                sum[j] += (uint32_t)(soft_byte(soft_tiles[a].b[i][k], sign_a) *
                                     soft_byte(soft_tiles[b].b[k / 4][j * 4 + k % 4], sign_b));
        memcpy(soft_tiles[c].b[i], sum, (size_t)soft_tile_bytes[c]);
    }
}
SOFT_INLINE void soft_tile_dot_s8s8(int c, int a, int b) { soft_tile_dot_bytes(c, a, b, 0x80, 0x80); }
SOFT_INLINE void soft_tile_dot_s8u8(int c, int a, int b) { soft_tile_dot_bytes(c, a, b, 0x80, 0); }
SOFT_INLINE void soft_tile_dot_u8s8(int c, int a, int b) { soft_tile_dot_bytes(c, a, b, 0, 0x80); }

#undef F32
#undef I32
#undef U32
#undef I16
#undef U16
#undef I8
#undef U8
#undef U64

#define _mm512_loadu_ps(p) ((__m512)soft_loadu(p))
#define _mm512_loadu_si512 soft_loadu
#define _mm512_storeu_ps(p, a) soft_storeu(p, (__m512i)(a))
#define _mm512_storeu_si512 soft_storeu
#define _mm512_stream_ps soft_stream_ps
#define _mm512_mask_storeu_ps soft_mask_storeu_ps
#define _mm512_maskz_loadu_ps soft_maskz_loadu_ps
#define _mm512_setzero_ps() ((__m512){0})
#define _mm512_setzero_si512() ((__m512i){0})
#define _mm512_setr_epi32(...) ((__m512i)(soft_i32){__VA_ARGS__})
#define _mm512_castps_si512(a) ((__m512i)(a))
#define _mm512_castsi512_ps(a) ((__m512)(a))
#define _mm512_castps128_ps512 soft_castps128
#define _mm512_castps256_ps512 soft_castps256
#define _mm512_extractf32x8_ps(a, imm) (((soft_halves_ps){a}).half[(imm) & 1])
#define _mm512_castps512_ps256(a) _mm512_extractf32x8_ps(a, 0)
#define _mm512_extracti64x4_epi64(a, imm) ((__m256i)_mm512_extractf32x8_ps((__m512)(a), imm))
#define _mm512_castsi512_si256(a) _mm512_extracti64x4_epi64(a, 0)
#define _mm512_set1_ps soft_set1_ps
#define _mm512_set1_epi32 soft_set1_epi32
#define _mm512_set1_epi16 soft_set1_epi16
#define _mm512_set1_epi8 soft_set1_epi8
#define _mm512_unpacklo_ps soft_unpacklo_ps
#define _mm512_unpackhi_ps soft_unpackhi_ps
#define _mm512_permute_ps soft_permute_ps
#define _mm512_shuffle_ps soft_shuffle_ps
#define _mm512_shuffle_f32x4 soft_shuffle_f32x4
#define _mm512_permutexvar_ps soft_permutexvar_ps
#define _mm512_permutex2var_epi16 soft_permutex2var_epi16
#define _mm512_permutex2var_ps soft_permutex2var_ps
#define _mm512_mask_broadcast_f32x4 soft_mask_broadcast_f32x4
#define _mm512_broadcast_i32x4 soft_broadcast_i32x4
#define _mm512_mask_blend_ps soft_mask_blend_ps
#define _mm512_fmadd_ps soft_fmadd_ps
#define _mm512_maskz_mul_ps soft_maskz_mul_ps
#define _mm512_max_ps soft_max_ps
#define _mm512_min_ps soft_min_ps
#define _mm512_sqrt_ps soft_sqrt_ps
#define _mm512_abs_ps soft_abs_ps
#define _mm512_cmp_ps_mask soft_cmp_ps_mask
#define _mm512_scalef_ps soft_scalef_ps
#define _mm512_maskz_scalef_ps soft_maskz_scalef_ps
#define _mm512_rcp14_ps soft_rcp14_ps
#define _mm512_reduce_ps soft_reduce_ps
#define _mm512_reduce_add_ps soft_reduce_add_ps
#define _mm512_dpbf16_ps soft_dpbf16_ps
#define _mm512_cvtne2ps_pbh soft_cvtne2ps_pbh
#define _mm512_add_epi32 soft_add_epi32
#define _mm512_sub_epi32 soft_sub_epi32
#define _mm512_mullo_epi32 soft_mullo_epi32
#define _mm512_add_epi16 soft_add_epi16
#define _mm512_sub_epi16 soft_sub_epi16
#define _mm512_add_epi8 soft_add_epi8
#define _mm512_sub_epi8 soft_sub_epi8
#define _mm512_and_si512 soft_and_si512
#define _mm512_or_si512 soft_or_si512
#define _mm512_xor_si512 soft_xor_si512
#define _mm512_mask_or_epi32 soft_mask_or_epi32
#define _mm512_mask_add_epi32 soft_mask_add_epi32
#define _mm512_mask_test_epi32_mask soft_mask_test_epi32_mask
#define _mm512_srli_epi32 soft_srli_epi32
#define _mm512_slli_epi32 soft_slli_epi32
#define _mm512_srai_epi32 soft_srai_epi32
#define _mm512_srli_epi16 soft_srli_epi16
#define _mm512_slli_epi16 soft_slli_epi16
#define _mm512_shuffle_epi8 soft_shuffle_epi8
#define _mm512_madd_epi16 soft_madd_epi16
#define _mm512_maddubs_epi16 soft_maddubs_epi16
#define _mm512_dpbusd_epi32 soft_dpbusd_epi32
#define _mm512_dpwssd_epi32 soft_dpwssd_epi32
#define _mm256_dpbusd_avx_epi32 soft_dpbusd_avx_epi32
#define _mm256_dpwssd_avx_epi32 soft_dpwssd_avx_epi32
#define _mm512_reduce_add_epi32 soft_reduce_add_epi32
#define _mm512_cvtepu16_epi32 soft_cvtepu16_epi32
#define _mm512_cvtepi16_epi32 soft_cvtepi16_epi32
#define _mm512_cvtepu8_epi32 soft_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 soft_cvtepi8_epi32
#define _mm512_cvtepu8_epi16 soft_cvtepu8_epi16
#define _mm512_cvtepi8_epi16 soft_cvtepi8_epi16
#define _mm512_cvtepi32_epi16 soft_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 soft_cvtepi32_epi8
#define _mm512_cvtepi16_epi8 soft_cvtepi16_epi8
#define _mm512_cvtsepi32_epi8 soft_cvtsepi32_epi8
#define _mm512_cvtsepi32_epi16 soft_cvtsepi32_epi16
#define _mm512_cvtsepi16_epi8 soft_cvtsepi16_epi8
#define _mm512_cvtusepi32_epi8 soft_cvtusepi32_epi8
#define _mm512_cvtusepi32_epi16 soft_cvtusepi32_epi16
#define _mm512_cvtusepi16_epi8 soft_cvtusepi16_epi8
#define _mm512_packs_epi32 soft_packs_epi32
#define _mm512_packus_epi32 soft_packus_epi32
#define _mm512_packs_epi16 soft_packs_epi16
#define _mm512_packus_epi16 soft_packus_epi16
#define _mm512_cvtepi32_ps soft_cvtepi32_ps
#define _mm512_cvtps_epi32 soft_cvtps_epi32
#define _mm512_cvttps_epi32 soft_cvttps_epi32
#define _mm512_cvtps_ph soft_cvtps_ph
#define _mm512_cvtph_ps soft_cvtph_ps
#endif
