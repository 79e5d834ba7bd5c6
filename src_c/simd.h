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
#else
#define vi_shuffle(a, ...) __builtin_shuffle(a, (vi){__VA_ARGS__})
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

/* ---- reductions: a fixed tree, halves folded together ---- */

FC_INLINE float vf_sum(vf a) {
    float s[FC_N];
    vf_store(s, a);
#pragma GCC unroll 16
    for (int w = FC_N / 2; w; w /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
}

FC_INLINE float vf_hmax(vf a) {
    float s[FC_N];
    vf_store(s, a);
#pragma GCC unroll 16
    for (int w = FC_N / 2; w; w /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < w; i++) s[i] = s[i] > s[i + w] ? s[i] : s[i + w];
    return s[0];
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
    float s[FC_N];
    vf_store(s, a);
    for (ptrdiff_t i = n; i < FC_N; i++) s[i] = fill;
    return vf_load(s);
}

/* ---- elementary functions; errors over all floats are in docs/accuracy.md ---- */

/* q of  e^r = 1 + r + r^2 q(r),  minimax of degree 4, where x = n ln2 + r, |r| <= ln2/2; n in the lowest bits of *t */
FC_INLINE vf vf_exp_q(vf x, vf *t, vf *r) {
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    *t = vf_fma(x, vf_set1(1.44269504f), magic);
    vf n = *t - magic;
    *r = vf_fma(n, vf_set1(-0.693359375f), x);
    *r = vf_fma(n, vf_set1(2.12194440e-4f), *r);
    vf q = vf_fma(*r, vf_set1(1.38145965e-3f), vf_set1(8.36871751e-3f));
    q = vf_fma(*r, q, vf_set1(4.16683890e-2f));
    q = vf_fma(*r, q, vf_set1(1.66665211e-1f));
    return vf_fma(*r, q, vf_set1(4.99999940e-1f));
}

/* e^x = 2^n (1 + r + r^2 q) */
FC_INLINE vf vf_exp(vf x) {
    vf t, r, q = vf_exp_q(vf_min(vf_set1(89.0f), vf_max(vf_set1(-104.0f), x)), &t, &r);
    return vf_scale2(vf_fma(r * r, q, r) + vf_set1(1.0f), t - vf_set1(12582912.0f));
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
FC_INLINE vf vf_exp_parts(vf x, vf *t) {
    vf r, p = vf_exp_q(x, t, &r);
    p = vf_fma(r, p, vf_set1(1.0f));
    return vf_fma(r, p, vf_set1(1.0f));
}

/* e^x for x <= 0 in fewer operations than vf_exp: 0 where 2^n is no normal float, under 2^-126.5. */
FC_INLINE vf vf_exp_negative(vf x) {
    vf t, p = vf_exp_parts(vf_max(vf_set1(-88.0f), x), &t);
    return p * vf_power_of_2(t);
}

/* x / (1 + e^-u) as  x s / (s + e^-u s),  s = 2^-(n/2) where e^-u = 2^n e^r is large: nothing overflows, and the result
 * underflows once and gradually. Where -u > 176, s is 0. */
FC_INLINE vf vf_times_sigmoid(vf x, vf u) {
    vf t, p = vf_exp_parts(vf_min(vf_set1(176.4f), vf_max(vf_set1(-87.0f), -u)), &t);
    const vi n = (vi)t - 0x4b400000, half = (n & ~(n >> 31)) >> 1;
    const vf s = (vf)((vu)(127 - half) << 23);
    return x * s / (s + p * (vf)((vu)(n - half + 127) << 23));
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

/* Normal distribution function: Phi(-a) = e^(-a^2/2) t P(t), t = 1 / (1 + 0.38 a), a >= 0.
 * a^2 is carried in two floats, or its rounding would grow by a^2/2 in the exponential. */
FC_INLINE vf vf_normal_cdf(vf x) {
    vf a = vf_min(vf_set1(40.0f), vf_abs(x));
    vf t = vf_set1(1.0f) / vf_fma(a, vf_set1(0.38f), vf_set1(1.0f));
    vf p = vf_fma(t, vf_set1(2.39779539e-2f), vf_set1(-1.47612453e-1f));
    p = vf_fma(t, p, vf_set1(3.64978909e-1f));
    p = vf_fma(t, p, vf_set1(-4.29948390e-1f));
    p = vf_fma(t, p, vf_set1(2.06660971e-1f));
    p = vf_fma(t, p, vf_set1(-5.41453771e-2f));
    p = vf_fma(t, p, vf_set1(1.05907381e-1f));
    p = vf_fma(t, p, vf_set1(1.26746133e-1f));
    p = vf_fma(t, p, vf_set1(1.51845664e-1f));
    p = vf_fma(t, p, vf_set1(1.51589170e-1f));
    vf a2 = a * a, low = vf_fma(a, a, -a2);
    vf tail = vf_exp(a2 * -0.5f) * vf_fma(low, vf_set1(-0.5f), vf_set1(1.0f)) * (t * p);
    return vf_if_lt(x, vf_zero(), tail, vf_set1(1.0f) - tail);
}

#endif
