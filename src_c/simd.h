/* The vector vocabulary: every kernel is written in these words, once, for every ISA.
 *
 * An isa/<name>.c file sets FC_BYTES (16, 32 or 64) and its target pragma, then includes this.
 * Arithmetic is the compiler's vector extension (+ - * / and compares); what the language lacks
 * comes from simd/<backend>.h. A backend is keyed on FC_BYTES and the architecture alone.
 * Loads and stores have no alignment requirement. The *_n words touch exactly n elements,
 * 0 <= n <= FC_N, and read zeros beyond them: no kernel ever reads past an array.
 * Nothing here allocates, branches on data outside a select, or knows a thread. */
#ifndef FC_SIMD_H
#define FC_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "forge.h"

#define FC_N (FC_BYTES / 4)
#define FC_INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(FC_BYTES)));
typedef int32_t vi __attribute__((vector_size(FC_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FC_BYTES)));
typedef uint16_t vu16 __attribute__((vector_size(FC_BYTES)));
typedef float vf_any __attribute__((vector_size(FC_BYTES), aligned(1), may_alias));

FC_INLINE vf vf_set1(float a) { return a - (vf){0}; }
FC_INLINE vf vf_zero(void) { return (vf){0}; }
FC_INLINE vf vf_load(const void *p) { return *(const vf_any *)p; }
/* p[0] in every lane */
FC_INLINE vf vf_load1(const void *p) {
    float a;
    memcpy(&a, p, 4);
    return vf_set1(a);
}
FC_INLINE void vf_store(void *p, vf a) { *(vf_any *)p = a; }
#ifdef __clang__
#define vi_shuffle(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#define vi_two(a, b, ...) __builtin_shufflevector((vi)(a), (vi)(b), __VA_ARGS__) /* lanes of b from FC_N on */
#else
#define vi_shuffle(a, ...) __builtin_shuffle(a, (vi){__VA_ARGS__})
#define vi_two(a, b, ...) __builtin_shuffle((vi)(a), (vi)(b), (vi){__VA_ARGS__})
#endif
FC_INLINE vf vf_from_int(vi a) { return __builtin_convertvector(a, vf); }
FC_INLINE vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* Backend words:
 *   vf_fma(a, b, c)         a*b + c, fused where the ISA can
 *   vf_max(a, b), vf_min    b where either is NaN
 *   vf_if_lt(a, b, x, y)    a < b ? x : y
 *   vf_sqrt(a)              correctly rounded
 *   vf_load_n, vf_store_n   the first n floats
 *   vf_from_f16, vf_from_bf16, vf_to_f16, vf_to_bf16     FC_N 16-bit values at p
 *   vi_from_s8              2 FC_N signed bytes at p as int16 lanes
 *   vf_scale2(a, n)         a * 2^n, n integral in [-160, 130], one rounding
 *   vf_transpose(r)         r[FC_N] as a square matrix, in place
 *   vf_load_transposed(r, p, ld)   r[j][i] = float j of row i, rows ld bytes apart
 *   vf_stream(p, a), vf_stream_end()   store past the caches, p a multiple of FC_BYTES; after the last one, the fence
 *   vf_stream_part(p, from) likewise the least that can be: a vector, or 16 bytes of 64
 *   vf_swap(a)              a[1] a[0] a[3] a[2] ...
 *   vf_add_product(acc, a, b)      acc + a*b as vf_fma; see below
 *   vi_madd16(a, b)                int16 lanes: a[2i] b[2i] + a[2i+1] b[2i+1], exact in int32
 *   vi_add_madd16(acc, a, b)       acc + that; see below
 *   vi_put8, vi_put16       FC_N int32 lanes, small enough, as int8 or int16 at p
 *   vi_from_u8, vi_from_i8  FC_N bytes at p, unsigned or signed, as int32 lanes
 *   vu_look_up(table, i)    byte lanes: table[i] of 16 bytes, i 0..15
 * and where the ISA has them
 *   FC_HAS_PAIR      vf_bf16_pair(a, b), vf_f16_pair(a, b)   2 FC_N 16-bit values: a store of each half and a load of
 *                                                both would wait for all earlier stores
 *   FC_HAS_BF16_PAIR vf_bf16_pair_flushed(a, b)   vf_bf16_pair in one instruction, and 0 for subnormal numbers
 *   FC_HAS_BF16_DOT  vf_dot_bf16(acc, w, x)       acc + w[2i] x[2i] + w[2i+1] x[2i+1] of bfloat16 pairs
 *   FC_HAS_I8_DOT    vi_dot_i8(acc, u8, s8)       acc + the four products of bytes in each lane
 *                    vi_dot_i16(acc, a, b)        acc + vi_madd16(a, b)
 *   FC_HAS_SCALE     vf_off_integer(a)            a less the nearest integer, 0 for infinity
 *                    vf_scale_from(a, n, x, y)    x < y ? 0 : a * 2^n, n any integral float or infinity
 *   FC_HAS_LOOK_UP_32   vf_look_up_32(table, i)   table[i % 32] of 32 floats, a multiple of FC_BYTES
 *                    vf_product_from(a, b, x, y)  x < y ? 0 : a b
 *   FC_HAS_RECIPROCAL_SHORT   vf_reciprocal_short(a)   1 / a to 2^-14; what processors make of the rest differs
 *   FC_HAS_MADDUBS   vi_maddubs(u8, s8)           int16 lanes: the sum of two products of bytes, which must fit
 *                    vi_add_maddubs(acc, u8, s8)  acc + that
 *
 * The words that add products to an accumulator are for tiles that fill the registers. On x86 they are one or two
 * instructions of assembly that change it where it is: left to itself, gcc 12 makes products first and adds them later,
 * or moves accumulators about, and both end on the stack inside the loop. */
#if FC_BYTES == 64
#include "simd/avx512.h"
#elif FC_BYTES == 32
#include "simd/avx2.h"
#elif defined(__x86_64__)
#include "simd/sse2.h"
#else
#include "simd/neon.h"
#endif

/* From here on subnormal numbers count as 0, and what would be one becomes 0, until vf_keep_subnormals(what this
 * returned): for loops whose numbers may die away, and then cost a hundred times as much. Both are walls to the
 * compiler: arithmetic on what lies in memory stays on its side. */
FC_INLINE uint64_t vf_flush_subnormals(void) {
    uint64_t before;
#ifdef __x86_64__
    before = _mm_getcsr();
    _mm_setcsr((unsigned)before | 0x8040u); /* flush to zero, denormals are zero */
#else
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1u << 24)); /* FZ */
#endif
    __asm__ volatile("" : : : "memory");
    return before;
}
FC_INLINE void vf_keep_subnormals(uint64_t before) {
    __asm__ volatile("" : : : "memory");
#ifdef __x86_64__
    _mm_setcsr((unsigned)before);
#else
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#endif
}

#ifndef FC_HAS_FROM_I8
FC_INLINE vi vi_from_i8(const void *p) { return (vi_from_u8(p) ^ 128) - 128; }
#endif

#ifndef FC_HAS_MAX_UNSIGNED
FC_INLINE vu vu_max(vu a, vu b) {
    const vu more = (vu)(a > b);
    return (a & more) | (b & ~more);
}
#endif

/* The low bytes of v[4] to 4 FC_N neighbours, which are 0..127, or 0..255 where the ISA multiplies bytes by bytes */
#ifndef FC_HAS_PUT8_FOUR
FC_INLINE void vi_put8_four(uint8_t *p, const vi v[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) vi_put8((int8_t *)p + j * FC_N, v[j]);
}
#endif

#ifndef FC_HAS_LOAD_TRANSPOSED
FC_INLINE void vf_load_transposed(vf *r, const char *p, ptrdiff_t ld) {
#pragma GCC unroll 16
    for (int i = 0; i < FC_N; i++) r[i] = vf_load(p + i * ld);
    vf_transpose(r);
}
#endif

/* ---- storage types: decoded at the load, encoded at the store, float32 in between ---- */

FC_INLINE vf vf_get(fc_dtype t, const void *p, ptrdiff_t i) {
    if (t == FC_F32) return vf_load((const float *)p + i);
    if (t == FC_F16) return vf_from_f16((const uint16_t *)p + i);
    return vf_from_bf16((const uint16_t *)p + i);
}

FC_INLINE void vf_put(fc_dtype t, void *p, ptrdiff_t i, vf a) {
    if (t == FC_F32) vf_store((float *)p + i, a);
    else if (t == FC_F16) vf_to_f16((uint16_t *)p + i, a);
    else vf_to_bf16((uint16_t *)p + i, a);
}

FC_INLINE vf vf_get_n(fc_dtype t, const void *p, ptrdiff_t i, ptrdiff_t n) {
    if (t == FC_F32) return vf_load_n((const float *)p + i, n);
    uint16_t part[FC_N] = {0};
    memcpy(part, (const uint16_t *)p + i, (size_t)n * 2);
    return vf_get(t, part, 0);
}

FC_INLINE void vf_put_n(fc_dtype t, void *p, ptrdiff_t i, vf a, ptrdiff_t n) {
    if (t == FC_F32) {
        vf_store_n((float *)p + i, a, n);
        return;
    }
    uint16_t part[FC_N];
    vf_put(t, part, 0, a);
    memcpy((uint16_t *)p + i, part, (size_t)n * 2);
}

/* a and b as 2 FC_N values of a 16-bit type */
FC_INLINE vf vf_halves(fc_dtype t, vf a, vf b) {
#ifdef FC_HAS_PAIR
    return t == FC_BF16 ? vf_bf16_pair(a, b) : vf_f16_pair(a, b);
#else
    uint16_t both[2 * FC_N];
    vf_put(t, both, 0, a);
    vf_put(t, both, FC_N, b);
    return vf_load(both);
#endif
}

/* The same as bfloat16, of numbers none of which is subnormal */
FC_INLINE vf vf_bf16_pair_of_normals(vf a, vf b) {
#ifdef FC_HAS_BF16_PAIR
    return vf_bf16_pair_flushed(a, b);
#else
    return vf_halves(FC_BF16, a, b);
#endif
}

/* 2 FC_N values of a 16-bit type, of bfloat16 those at even places and those at odd ones */
FC_INLINE void vf_get_pair(fc_dtype t, const void *p, ptrdiff_t i, vf *a, vf *b) {
    if (t == FC_BF16) {
        const vu both = (vu)vf_load((const uint16_t *)p + i);
        *a = (vf)(both << 16), *b = (vf)(both & 0xffff0000u);
    } else {
        *a = vf_get(t, p, i), *b = vf_get(t, p, i + FC_N);
    }
}

/* What vf_get_pair splits. To bfloat16 ties are rounded away from 0, in half the operations that they take to even; a
 * NaN's lower half must be 0, as that of a bfloat16 is. */
FC_INLINE vf vf_of_pair(fc_dtype t, vf a, vf b) {
    if (t != FC_BF16) return vf_halves(t, a, b);
    return (vf)((((vu)a + 0x8000u) >> 16) | (((vu)b + 0x8000u) & 0xffff0000u));
}

/* a and b to 2 FC_N neighbours from i on */
FC_INLINE void vf_put2(fc_dtype t, void *p, ptrdiff_t i, vf a, vf b) {
    if (t == FC_F32) {
        vf_store((float *)p + i, a);
        vf_store((float *)p + i + FC_N, b);
    } else {
        vf_store((uint16_t *)p + i, vf_halves(t, a, b));
    }
}

/* A full vector where one fits at i, else the last n - i elements and zeros. */
FC_INLINE vf vf_get_upto(fc_dtype t, const void *p, ptrdiff_t i, ptrdiff_t n) {
    return i + FC_N <= n ? vf_get(t, p, i) : vf_get_n(t, p, i, n - i);
}

FC_INLINE void vf_put_upto(fc_dtype t, void *p, ptrdiff_t i, vf a, ptrdiff_t n) {
    if (i + FC_N <= n) vf_put(t, p, i, a);
    else vf_put_n(t, p, i, a, n - i);
}

/* How many floats from out on lie before the first aligned vector; 0 for types of 16 bits, and for few */
FC_INLINE ptrdiff_t vf_floats_to_aligned(fc_dtype t, const void *out, ptrdiff_t n) {
    return t != FC_F32 || (uintptr_t)out % 4 || n < 8 * FC_N ? 0 : (ptrdiff_t)(-(uintptr_t)out % FC_BYTES / 4);
}

/* ---- reductions: a fixed tree, halves folded together ---- */

/* lane i is a[i ^ w], w a constant */
FC_INLINE vf vf_across(vf a, int w) {
#if FC_BYTES == 64
    if (w == 8) return (vf)vi_shuffle((vi)a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if (w == 4) return (vf)vi_shuffle((vi)a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    if (w == 2) return (vf)vi_shuffle((vi)a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return (vf)vi_shuffle((vi)a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif FC_BYTES == 32
    if (w == 4) return (vf)vi_shuffle((vi)a, 4, 5, 6, 7, 0, 1, 2, 3);
    if (w == 2) return (vf)vi_shuffle((vi)a, 2, 3, 0, 1, 6, 7, 4, 5);
    return (vf)vi_shuffle((vi)a, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return w == 2 ? (vf)vi_shuffle((vi)a, 2, 3, 0, 1) : (vf)vi_shuffle((vi)a, 1, 0, 3, 2);
#endif
}

FC_INLINE float vf_sum(vf a) {
#pragma GCC unroll 4
    for (int w = FC_N / 2; w; w /= 2) a += vf_across(a, w);
    return a[0];
}

FC_INLINE float vf_hmax(vf a) {
#pragma GCC unroll 4
    for (int w = FC_N / 2; w; w /= 2) a = vf_max(a, vf_across(a, w));
    return a[0];
}

FC_INLINE int32_t vi_sum(vi a) {
    int32_t s[FC_N], sum = 0;
    memcpy(s, &a, sizeof s);
    for (int i = 0; i < FC_N; i++) sum += s[i];
    return sum;
}

/* a[0] a[2] a[1] a[3]  a[4] a[6] a[5] a[7] ... */
FC_INLINE vi vi_order_0213(vi a) {
#if FC_BYTES == 64
    return vi_shuffle(a, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
#elif FC_BYTES == 32
    return vi_shuffle(a, 0, 2, 1, 3, 4, 6, 5, 7);
#else
    return vi_shuffle(a, 0, 2, 1, 3);
#endif
}

/* The first n lanes of a, `fill` in the others. */
FC_INLINE vf vf_fill_from(vf a, ptrdiff_t n, float fill) {
    const vi lane = {0, 1, 2, 3,
#if FC_BYTES > 16
                     4, 5, 6, 7,
#endif
#if FC_BYTES > 32
                     8, 9, 10, 11, 12, 13, 14, 15
#endif
    };
    const vi keep = lane < (vi){0} + (int32_t)n;
    return (vf)(((vi)a & keep) | ((vi)vf_set1(fill) & ~keep));
}

/* ---- elementary functions; errors over all floats are in docs/accuracy.md ---- */

/* r, |r| <= ln2/2, of  x = n ln2 + r;  n in the lowest bits of *t */
FC_INLINE vf vf_exp_rest(vf x, vf *t) {
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    *t = vf_fma(x, vf_set1(1.44269504f), magic);
    vf n = *t - magic;
    return vf_fma(n, vf_set1(2.12194440e-4f), vf_fma(n, vf_set1(-0.693359375f), x));
}

/* q of  e^r = 1 + r + r^2 q(r),  minimax of degree 4 */
FC_INLINE vf vf_exp_q(vf r) {
    vf q = vf_fma(r, vf_set1(1.38145965e-3f), vf_set1(8.36871751e-3f));
    q = vf_fma(r, q, vf_set1(4.16683890e-2f));
    q = vf_fma(r, q, vf_set1(1.66665211e-1f));
    return vf_fma(r, q, vf_set1(4.99999940e-1f));
}

FC_INLINE vf vf_exp_near_0(vf r) { return vf_fma(r, vf_fma(r, vf_exp_q(r), vf_set1(1.0f)), vf_set1(1.0f)); }

/* e^x = 2^n (1 + r + r^2 q) */
FC_INLINE vf vf_exp(vf x) {
    vf t, r = vf_exp_rest(vf_min(vf_set1(89.0f), vf_max(vf_set1(-104.0f), x)), &t);
    return vf_scale2(vf_fma(r * r, vf_exp_q(r), r) + vf_set1(1.0f), t - vf_set1(12582912.0f));
}

/* 2^n, n in the lowest bits of t; unsigned, as the bits above them go over the edge */
FC_INLINE vf vf_power_of_2(vf t) { return (vf)(((vu)t << 23) + 0x3f800000u); }

/* (2^r - 1) / r for |r| <= 1/2: c1 + ... + c6 r^5, c minimax for 2^r */
FC_INLINE vf vf_exp2_slope(vf r) {
    vf p = vf_fma(r, vf_set1(1.53533620e-4f), vf_set1(1.33988750e-3f));
    p = vf_fma(r, p, vf_set1(9.61843692e-3f));
    p = vf_fma(r, p, vf_set1(5.55033237e-2f));
    p = vf_fma(r, p, vf_set1(0.240226477f));
    return vf_fma(r, p, vf_set1(0.693147182f));
}

/* 2^r for |r| <= 1/2 */
FC_INLINE vf vf_exp2_near_0(vf r) { return vf_fma(r, vf_exp2_slope(r), vf_set1(1.0f)); }

/* 2^x for x <= 0, as the weights of attention need it: 2^n 2^r, r = x - n exact; 0 where 2^n is no normal float. A NaN
 * stays one. */
FC_INLINE vf vf_exp2_negative(vf x) {
    const vf magic = vf_set1(12582912.0f);
    x = vf_max(vf_set1(-127.0f), x);
    vf t = x + magic, r = x - (t - magic);
    return vf_exp2_near_0(r) * vf_power_of_2(t);
}

/* The same address, but the compiler cannot know: what lies there is loaded anew, since keeping it would not leave
 * enough registers for what changes. */
FC_INLINE const char *opaque(const char *p) {
    __asm__ volatile("" : "+r"(p));
    return p;
}

/* 2^x for any x, 1 for 0: 2^n 2^r as above, and 0 where that is no normal float, which would take processors a hundred
 * cycles. Where the ISA has no word for that, 2^(n - 1) times 2 2^r, since a result may be finite where 2^n is not; 0
 * where 2^(n - 1) is no normal float. n + 126 is then in the lowest bits of t, and all constants stay in memory, as the
 * registers of a loop that has state would not hold both. */
#ifdef FC_HAS_SCALE
FC_INLINE vf vf_exp2(vf x) {
    vf r = vf_off_integer(x);
    return vf_scale_from(vf_exp2_near_0(r), x - r, x, vf_set1(-126.0f));
}
#else
#define FC_ALL(value) {[0 ... FC_N - 1] = value}
static const float fc_exp2_constants[10][FC_N] __attribute__((aligned(FC_BYTES))) = {
    FC_ALL(-126.0f), FC_ALL(129.0f), FC_ALL(12582912.0f + 126), FC_ALL(2 * 1.53533620e-4f), FC_ALL(2 * 1.33988750e-3f),
    FC_ALL(2 * 9.61843692e-3f), FC_ALL(2 * 5.55033237e-2f), FC_ALL(2 * 0.240226477f), FC_ALL(2 * 0.693147182f),
    FC_ALL(2.0f)};
#undef FC_ALL
FC_INLINE vf vf_exp2(vf x) {
    const char *c = opaque((const char *)fc_exp2_constants);
    x = vf_min(vf_load(c + FC_BYTES), vf_max(vf_load(c), x));
    vf t = x + vf_load(c + 2 * FC_BYTES), r = x - (t - vf_load(c + 2 * FC_BYTES));
    vf p = vf_load(c + 3 * FC_BYTES);
#pragma GCC unroll 6
    for (int i = 4; i < 10; i++) p = vf_fma(r, p, vf_load(c + i * FC_BYTES));
    return p * (vf)((vu)t << 23);
}
#endif

/* e^r and, in the lowest bits of *t, n, where x = n ln2 + r: e^x = 2^n e^r. -127 ln2 <= x <= 129 ln2. */
FC_INLINE vf vf_exp_parts(vf x, vf *t) { return vf_exp_near_0(vf_exp_rest(x, t)); }

/* e^x for x <= 0 in fewer operations than vf_exp: 0 where 2^n is no normal float, under 2^-126.5. */
FC_INLINE vf vf_exp_negative(vf x) {
    vf t, p = vf_exp_parts(vf_max(vf_set1(-88.0f), x), &t);
    return p * vf_power_of_2(t);
}

/* x / (1 + e^-u), e^-u = 2^n p, as  x / (1 + 2^m p) 2^(m - n),  m = min(n, 64), beyond which the 1 is nothing: no power
 * overflows, and the result underflows once and gradually. -u > 132 has n - m = 127, and 0 for 2^-127. */
FC_INLINE vf vf_times_sigmoid(vf x, vf u) {
    vf t, p = vf_exp_parts(vf_min(vf_set1(132.4f), vf_max(vf_set1(-86.0f), -u)), &t);
    const vf one = vf_set1(1.0f), m = vf_min(vf_set1(12582912.0f + 64), t);
    return x / vf_fma(p, vf_power_of_2(m), one) * (vf)((((vu)m - (vu)t) << 23) + 0x3f800000u);
}

/* log(1 + x) = 2 s (1 + s^2 p(s^2)) for 0 <= x <= 1, s = x / (2 + x), p minimax */
FC_INLINE vf vf_log1p_fraction(vf x) {
    vf s = x / (x + vf_set1(2.0f)), z = s * s;
    vf p = vf_fma(z, vf_set1(0.121508345f), vf_set1(0.107135929f));
    p = vf_fma(z, p, vf_set1(0.143084824f));
    p = vf_fma(z, p, vf_set1(0.19999437f));
    p = vf_fma(z, p, vf_set1(0.333333373f));
    vf twice = s + s;
    return vf_fma(twice * z, p, twice);
}

/* max(x, 0) + log(1 + e^-|x|): nothing overflows, nothing is lost for x << 0, and x > 20 is x */
FC_INLINE vf vf_softplus(vf x) { return vf_max(vf_zero(), x) + vf_log1p_fraction(vf_exp_negative(-vf_abs(x))); }

/* |x| < 0.625: x + x^3 p(x^2);  else sign(x) (1 - 2 / (e^(2|x|) + 1)) */
FC_INLINE vf vf_tanh(vf x) {
    vf a = vf_abs(x), z = x * x;
    vf p = vf_fma(z, vf_set1(-5.71703678e-3f), vf_set1(2.06505787e-2f));
    p = vf_fma(z, p, vf_set1(-5.37434965e-2f));
    p = vf_fma(z, p, vf_set1(1.33314908e-1f));
    p = vf_fma(z, p, vf_set1(-3.33332837e-1f));
    vf small = vf_fma(x * z, p, x);
    vf large = vf_set1(1.0f) - vf_set1(2.0f) / (vf_exp(a + a) + vf_set1(1.0f));
    large = (vf)((vi)large | ((vi)x & INT32_MIN));
    return vf_if_lt(a, vf_set1(0.625f), small, large);
}

/* x Phi(x) = max(x, 0) - a Phi(-a),  a = |x|,  Phi(-a) = e^(-a^2/2) t P(t),  t = 1 / (1 + 0.35 a).
 * a^2 is carried in two floats, or its rounding would grow by a^2/2 in the exponential. That is 2^32 times as large
 * until the end, where the result underflows once and gradually, and 0 from a = 14.85 on. */
FC_INLINE vf vf_times_normal_cdf(vf x) {
    const vf one = vf_set1(1.0f), a = vf_min(vf_set1(14.85f), vf_abs(x)), a2 = a * a, low = vf_fma(a, a, -a2);
    vf n, r = vf_exp_rest(a2 * -0.5f, &n), e = vf_exp_near_0(vf_fma(low, vf_set1(-0.5f), r));
    e *= (vf)(((vu)n << 23) + (159u << 23));
    const vf t = one / vf_fma(a, vf_set1(0.35f), one);
    vf p = vf_fma(t, vf_set1(-0.0291629378f), vf_set1(0.144055977f));
    p = vf_fma(t, p, vf_set1(-0.25589183f));
    p = vf_fma(t, p, vf_set1(0.159381405f));
    p = vf_fma(t, p, vf_set1(-0.023255853f));
    p = vf_fma(t, p, vf_set1(0.105571397f));
    p = vf_fma(t, p, vf_set1(0.11981637f));
    p = vf_fma(t, p, vf_set1(0.139864221f));
    p = vf_fma(t, p, vf_set1(0.139621273f));
    const vf tail = vf_abs(vf_min(vf_set1(15.0f), x)) * (e * (t * p)); /* NaN at -infinity, as the formula says */
    return vf_fma(tail, vf_set1(-0x1p-32f), vf_max(vf_zero(), x));
}

/* ---- the same for results of 16 bits, good to 2^-13 with a polynomial of degree 3 and 2^-18 with 4 ---- */

/* p and *power of  2^(n + f) = 2^n p,  0 <= f < 1, p good to 2^-13.7 (degree 3) or 2^-18.5 (4), from
 * bits = 2^23 (n + f + 127): under 0 the power is 0, and from 2^128 on infinity. */
FC_INLINE vf vf_exp2_short(int degree, vf bits, vf *power) {
    const vi z = __builtin_convertvector(vf_min(vf_set1(0x1.fep30f), vf_max(vf_zero(), bits)), vi);
    const vf m = (vf)((z & 0x7fffff) | 0x3f800000); /* 1 + f */
    *power = (vf)(z & 0x7f800000);
    vf p = vf_set1(degree == 3 ? 7.80245215e-2f : 1.35341678e-2f);
    if (degree == 4) p = vf_fma(m, p, vf_set1(-2.12520920e-3f));
    p = vf_fma(m, p, vf_set1(degree == 3 ? -8.00639763e-3f : 0.16661337f));
    p = vf_fma(m, p, vf_set1(degree == 3 ? 0.477772743f : 0.31201604f));
    return vf_fma(m, p, vf_set1(degree == 3 ? 0.452134371f : 0.509964228f));
}

#ifdef FC_HAS_LOOK_UP_32
/* the bits of 2^(i/32) less i 2^18, which adding (i + 32 n) 2^18 brings back beside n 2^23 */
static const uint32_t fc_exp2_steps[32] __attribute__((aligned(64))) = {
    0x3f800000u, 0x3f7ecd87u, 0x3f7daac3u, 0x3f7c980fu, 0x3f7b95c2u, 0x3f7aa43au, 0x3f79c3d3u, 0x3f78f4f0u,
    0x3f7837f0u, 0x3f778d3au, 0x3f76f532u, 0x3f767043u, 0x3f75fed7u, 0x3f75a15bu, 0x3f75583fu, 0x3f7523f6u,
    0x3f7504f3u, 0x3f74fbafu, 0x3f7508a4u, 0x3f752c4du, 0x3f75672au, 0x3f75b9beu, 0x3f76248cu, 0x3f76a81eu,
    0x3f7744fdu, 0x3f77fbb8u, 0x3f78ccdfu, 0x3f79b907u, 0x3f7ac0c7u, 0x3f7be4bau, 0x3f7d257du, 0x3f7e83b3u,
};
/* 8 + log2 Phi(-a) = c0 + a (c1 + a c2) to 2^-15 in intervals of a: 8 of 1/8 from 0 on, 8 of 1/4, 8 of 1/2, 8 of 1.
 * Their numbers are the bits of 1 + a from 2^20 on, modulo 32. */
static const float fc_log2_cdf[3][32] __attribute__((aligned(64))) = {
    {
        6.9555435f, 6.927811f, 6.8941236f, 6.8554087f, 6.812624f, 6.766671f, 6.718355f, 6.668369f,
        6.5925965f, 6.4887085f, 6.385577f, 6.284723f, 6.187009f, 6.092878f, 6.002503f, 5.915894f,
        5.794481f, 5.642044f, 5.5019875f, 5.372833f, 5.2532434f, 5.1420527f, 5.038261f, 4.9410152f,
        6.9999967f, 6.9997067f, 6.998638f, 6.9964113f, 6.9927497f, 6.9874697f, 6.980464f, 6.9716897f,
    },
    {
        -1.0238029f, -0.9793655f, -0.9343884f, -0.8900894f, -0.8472582f, -0.8063718f, -0.7676856f, -0.7313034f,
        -0.6814848f, -0.6219822f, -0.57031703f, -0.5254197f, -0.48628005f, -0.45200977f, -0.42185372f, -0.39518064f,
        -0.36088875f, -0.32268316f, -0.29149577f, -0.26562136f, -0.24384713f, -0.22529314f, -0.20930876f, -0.19540413f,
        -1.1506543f, -1.1460844f, -1.1375595f, -1.1256896f, -1.1110442f, -1.0941435f, -1.0754548f, -1.055391f,
    },
    {
        -0.5877861f, -0.6056022f, -0.6206234f, -0.63330096f, -0.6440238f, -0.6531208f, -0.6608664f, -0.6674876f,
        -0.675678f, -0.6842017f, -0.6906745f, -0.69567245f, -0.69959265f, -0.70271236f, -0.7052283f, -0.70728225f,
        -0.709704f, -0.71209866f, -0.71383524f, -0.7151314f, -0.71612275f, -0.71689683f, -0.71751237f, -0.7180094f,
        -0.4688711f, -0.4872376f, -0.50433f, -0.52018404f, -0.53484917f, -0.54838455f, -0.56085527f, -0.5723297f,
    },
};

/* 2^x, x the multiple of 1/32, from -127 on, that the lowest bits of t = x + 1.5 2^18 count; 0 for -127 */
FC_INLINE vf vf_power_of_32nds(vf t) {
    return (vf)((vu)vf_look_up_32(fc_exp2_steps, (vu)t) + ((vu)t << 18));
}
#endif

/* e^x for x <= 0 as vf_exp_negative, good to 2^-23 (1 + |x|) of itself; 0 from -88.03 on */
FC_INLINE vf vf_exp_negative_short(vf x) {
#ifdef FC_HAS_LOOK_UP_32
    const vf log2e = vf_set1(1.44269504f), magic = vf_set1(393216.0f);
    x = vf_max(vf_set1(-88.0296936f), x);
    const vf t = vf_fma(x, log2e, magic), r = vf_fma(x, log2e, magic - t), power = vf_power_of_32nds(t);
    return vf_fma(power, r * vf_fma(r, vf_set1(0.240226f), vf_set1(0.693157343f)), power);
#else
    return vf_exp_negative(x);
#endif
}

#ifndef FC_HAS_RECIPROCAL_SHORT
FC_INLINE vf vf_reciprocal_short(vf a) { return vf_set1(1.0f) / a; }
#endif

/* x / (1 + e^-u) from  bits = 2^23 (127 - 24 - u log2(e)):  2^-24 e^-u does not overflow where the result is not 0 */
FC_INLINE vf vf_times_sigmoid_short(int degree, vf x, vf bits) {
    const vf s = vf_set1(0x1p-24f);
    vf power, p = vf_exp2_short(degree, bits, &power);
    return x * (s * vf_reciprocal_short(vf_fma(power, p, s)));
}

/* x Phi(x) = max(x, 0) - a 2^-8 2^g(a) to 2^-14, g = 8 + log2 Phi(-a) by the table; what is subtracted is 0 for x under
 * -13.15, where it would be under 2^-126 and the table soon ends, and NaN at -infinity */
#ifdef FC_HAS_LOOK_UP_32
FC_INLINE vf vf_times_normal_cdf_bf16(vf x) {
    const vf one = vf_set1(1.0f), magic = vf_set1(393216.0f), a = vf_abs(vf_min(vf_set1(13.15f), x));
    const vu i = (vu)(a + one) >> 20;
    vf g = vf_fma(a, vf_look_up_32(fc_log2_cdf[2], i), vf_look_up_32(fc_log2_cdf[1], i));
    g = vf_fma(a, g, vf_look_up_32(fc_log2_cdf[0], i));
    const vf t = g + magic, r = g - (t - magic), p = vf_fma(r, vf_set1(0.693147182f * 0x1p-8f), vf_set1(0x1p-8f));
    return vf_fma(-a, vf_product_from(p, vf_power_of_32nds(t), x, vf_set1(-13.15f)), vf_max(vf_zero(), x));
}
#endif

/* x Phi(x) as above, P of degree 4 and good to 2^-14.8; -a Phi(-a) is 0 under 2^-126 */
FC_INLINE vf vf_times_normal_cdf_short(int degree, vf x) {
    const vf a = vf_min(vf_set1(14.0f), vf_abs(x));
    vf power, e = vf_exp2_short(degree, vf_fma(a * a, vf_set1(-6051101.58f), vf_set1(0x1.fcp29f)), &power);
    const vf t = vf_reciprocal_short(vf_fma(a, vf_set1(0.38f), vf_set1(1.0f)));
    vf p = vf_fma(t, vf_set1(-8.99280980e-2f), vf_set1(0.188875929f));
    p = vf_fma(t, p, vf_set1(9.19801444e-2f));
    p = vf_fma(t, p, vf_set1(0.157829359f));
    p = vf_fma(t, p, vf_set1(0.15122515f));
    return vf_max(vf_zero(), x) - vf_abs(vf_min(vf_set1(14.0f), x)) * (e * power * (t * p));
}

#endif
