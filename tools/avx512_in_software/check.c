/* Checks this folder's immintrin.h on random lanes: against two AVX2 or F16C instructions where they exist, the FMA unit
 * itself set to flush for vdpbf16ps, else against the manual's pseudo code. Prints the names that are off; exit status 1.
 *     gcc -O2 -mavx2 -mfma -mf16c -Wno-psabi -I. check.c -lm && ./a.out */
#include <immintrin.h>
#include <stdio.h>

typedef union {
    float f[16];
    uint32_t u[16];
    int32_t d[16];
    uint16_t h[32];
    uint8_t b[64];
} lanes;

static lanes a, b, c, got, want;
static __mmask16 k;
static int failures, round_no;

static uint64_t state = 1;
static uint32_t bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}
/* Any bits; infinities, NaNs, zeros and their neighbours; integers about the limits; ordinary numbers; near 2^-126. */
static uint32_t lane(void) {
    static const uint32_t special[] = {0, 1, 0x3fffff, 0x7fffff, 0x800000, 0x800001, 0x7f7fffff, 0x7f800000, 0x7f800001,
                                       0x7fa00000, 0x7fc00000, 0x7fffffff, 0x3f800000, 0x4effffff, 0x4f000000, 0x7fff7fff,
                                       0xff, 0x7f, 0x7fff, 0x8000, 0xffff, 0x10000, 0x80018001, 0x80808080};
    uint32_t r = bits();
    switch (bits() >> 29) {
    case 0: return special[r % (sizeof special / 4)] | (bits() & 0x80000000);
    case 1: return special[r % (sizeof special / 4)] ^ (bits() & 0x80000000);
    case 2: return (uint32_t)((int32_t)(r << 20) >> 20);
    case 3: return (r & 0x803fffff) | (r >> 8 & 7) << 22;
    case 4: return (r & 0x81ffffff) + 0x3f000000;
    case 5: return (r & 0x87ffffff) + 0x3c000000;
    default: return r;
    }
}
static void draw(void) {
    for (int i = 0; i < 16; i++) a.u[i] = lane(), b.u[i] = lane(), c.u[i] = lane();
    k = (__mmask16)bits();
}

static void compare(const char *name, size_t bytes, int nan_is_nan) {
    for (size_t i = 0; i < bytes / 4; i++)
        if (got.u[i] != want.u[i] && !(nan_is_nan && isnan(got.f[i]) && isnan(want.f[i]))) {
            printf("%s, round %d, lane %zu: %08x, expected %08x from %08x %08x %08x\n", name, round_no, i, got.u[i],
                   want.u[i], a.u[i], b.u[i], c.u[i]);
            failures++;
            break;
        }
    memset(&got, 0xAA, sizeof got);
    memset(&want, 0x55, sizeof want);
}

#define A512 _mm512_loadu_ps(&a)
#define B512 _mm512_loadu_ps(&b)
#define C512 _mm512_loadu_ps(&c)
#define AI512 _mm512_loadu_si512(&a)
#define BI512 _mm512_loadu_si512(&b)
#define CI512 _mm512_loadu_si512(&c)
#define PS(x, h) _mm256_loadu_ps((x).f + 8 * (h))
#define SI(x, h) _mm256_loadu_si256((const void *)((x).f + 8 * (h)))
#define QUARTER(x, q) _mm_loadu_si128((const void *)((x).f + 4 * (q)))

/* got: the intrinsic; want: an expression of half h, for both */
#define HALVES_AS(name, nan_is_nan, result, half)                                                                      \
    do {                                                                                                               \
        _mm512_storeu_si512(&got, (__m512i)(result));                                                                  \
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((void *)(want.f + 8 * h), (__m256i)(half));                    \
        compare(name, 64, nan_is_nan);                                                                                 \
    } while (0)
#define HALVES(name, result, half) HALVES_AS(name, 0, result, half)
#define INTEGERS(name) HALVES(#name, _mm512_##name(AI512, BI512), _mm256_##name(SI(a, h), SI(b, h)))
#define BITWISE(name) HALVES(#name, _mm512_##name##_si512(AI512, BI512), _mm256_##name##_si256(SI(a, h), SI(b, h)))
#define FLOATS(name) HALVES(#name, _mm512_##name(A512, B512), _mm256_##name(PS(a, h), PS(b, h)))
#define SHIFT(name, real)                                                                                              \
    HALVES(#name, _mm512_##name(AI512, shift), _mm256_##real(SI(a, h), _mm_cvtsi32_si128((int)shift)))
#define WIDEN(name) HALVES(#name, _mm512_##name(SI(a, 0)), _mm256_##name(QUARTER(a, h)))
#define WIDEN_4(name)                                                                                                  \
    HALVES(#name, _mm512_##name(QUARTER(a, 0)), _mm256_##name(_mm_loadl_epi64((const void *)(a.b + 8 * h))))

/* narrowing: AVX2's packs of both halves, their 64-bit pieces put in order */
#define PIECES(name, ...) _mm256_permute4x64_epi64(_mm256_##name(__VA_ARGS__), 0xD8)
#define NARROW(name, expected)                                                                                         \
    do {                                                                                                               \
        _mm256_storeu_si256((void *)&got, _mm512_##name(AI512));                                                       \
        _mm256_storeu_si256((void *)&want, expected);                                                                  \
        compare(#name, 32, 0);                                                                                         \
    } while (0)
#define NARROW_4(name, expected)                                                                                       \
    do {                                                                                                               \
        _mm_storeu_si128((void *)&got, _mm512_##name(AI512));                                                          \
        _mm_storeu_si128((void *)&want, expected);                                                                     \
        compare(#name, 16, 0);                                                                                         \
    } while (0)
#define BOTH(f, x) f(SI(a, 0), x), f(SI(a, 1), x)

static __m128i packed_bytes(int is_signed, __m256i words) {
    __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    return is_signed ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high);
}

static void check_integers(unsigned shift) {
    INTEGERS(add_epi32); INTEGERS(sub_epi32); INTEGERS(mullo_epi32); INTEGERS(add_epi16); INTEGERS(sub_epi16);
    INTEGERS(add_epi8); INTEGERS(sub_epi8); INTEGERS(madd_epi16); INTEGERS(maddubs_epi16); INTEGERS(shuffle_epi8);
    INTEGERS(packs_epi32); INTEGERS(packus_epi32); INTEGERS(packs_epi16); INTEGERS(packus_epi16);
    BITWISE(and); BITWISE(or); BITWISE(xor);
    SHIFT(srli_epi32, srl_epi32); SHIFT(slli_epi32, sll_epi32); SHIFT(srai_epi32, sra_epi32);
    SHIFT(srli_epi16, srl_epi16); SHIFT(slli_epi16, sll_epi16);
    HALVES("set1_epi32", _mm512_set1_epi32(a.d[0]), _mm256_set1_epi32(a.d[0]));
    HALVES("set1_epi16", _mm512_set1_epi16((short)a.h[0]), _mm256_set1_epi16((short)a.h[0]));
    HALVES("set1_epi8", _mm512_set1_epi8((char)a.b[0]), _mm256_set1_epi8((char)a.b[0]));

    WIDEN(cvtepu16_epi32); WIDEN(cvtepi16_epi32); WIDEN(cvtepu8_epi16); WIDEN(cvtepi8_epi16);
    WIDEN_4(cvtepu8_epi32); WIDEN_4(cvtepi8_epi32);
    __m256i x = SI(a, 0), y = SI(a, 1);
    __m256i low16 = _mm256_set1_epi32(0xffff), low8 = _mm256_set1_epi32(0xff), low8_of_16 = _mm256_set1_epi16(0xff);
    NARROW(cvtepi32_epi16, PIECES(packus_epi32, BOTH(_mm256_and_si256, low16)));
    NARROW(cvtepi16_epi8, PIECES(packus_epi16, BOTH(_mm256_and_si256, low8_of_16)));
    NARROW(cvtsepi32_epi16, PIECES(packs_epi32, x, y));
    NARROW(cvtsepi16_epi8, PIECES(packs_epi16, x, y));
    NARROW(cvtusepi32_epi16, PIECES(packus_epi32, BOTH(_mm256_min_epu32, low16)));
    NARROW(cvtusepi16_epi8, PIECES(packus_epi16, BOTH(_mm256_min_epu16, low8_of_16)));
    NARROW_4(cvtepi32_epi8, packed_bytes(0, PIECES(packus_epi32, BOTH(_mm256_and_si256, low8))));
    NARROW_4(cvtsepi32_epi8, packed_bytes(1, PIECES(packs_epi32, x, y)));
    NARROW_4(cvtusepi32_epi8, packed_bytes(0, PIECES(packs_epi32, BOTH(_mm256_min_epu32, low8))));

    /* even and odd bytes apart, in 16 bits, for vpmaddwd */
#define EVEN_U8(x) _mm256_and_si256(x, _mm256_set1_epi16(0xff))
#define EVEN_S8(x) _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)
#define DOT_EVEN(h) _mm256_madd_epi16(EVEN_U8(SI(a, h)), EVEN_S8(SI(b, h)))
#define DOT_ODD(h) _mm256_madd_epi16(_mm256_srli_epi16(SI(a, h), 8), _mm256_srai_epi16(SI(b, h), 8))
    HALVES("dpwssd_epi32", _mm512_dpwssd_epi32(CI512, AI512, BI512),
           _mm256_add_epi32(SI(c, h), _mm256_madd_epi16(SI(a, h), SI(b, h))));
    HALVES("dpbusd_epi32", _mm512_dpbusd_epi32(CI512, AI512, BI512),
           _mm256_add_epi32(SI(c, h), _mm256_add_epi32(DOT_EVEN(h), DOT_ODD(h))));

#define HALF_DOT(name, expected)                                                                                       \
    _mm256_storeu_si256((void *)&got, _mm256_##name(SI(c, 0), SI(a, 0), SI(b, 0)));                                    \
    _mm256_storeu_si256((void *)&want, _mm256_add_epi32(SI(c, 0), expected));                                          \
    compare(#name, 32, 0);
    HALF_DOT(dpwssd_avx_epi32, _mm256_madd_epi16(SI(a, 0), SI(b, 0)))
    HALF_DOT(dpbusd_avx_epi32, _mm256_add_epi32(DOT_EVEN(0), DOT_ODD(0)))

    uint32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += a.u[i];
    got.d[0] = _mm512_reduce_add_epi32(AI512);
    want.u[0] = sum;
    compare("reduce_add_epi32", 4, 0);
}

/* mask bits of half h as whole lanes */
static __m256i mask_lanes(int h) {
    __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(k >> 8 * h), bit), bit);
}
#define IF_MASK(h, x, y) _mm256_blendv_ps(y, x, (__m256)mask_lanes(h))

/* the 32 lanes of x, y at index i, by AVX2's permutes of 8 */
static __m256 at_index(const lanes *x, __m256i i) {
    __m256 low = _mm256_permutevar8x32_ps(PS(*x, 0), i), high = _mm256_permutevar8x32_ps(PS(*x, 1), i);
    return _mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(i, 28));
}

static void check_moves(void) {
    FLOATS(unpacklo_ps); FLOATS(unpackhi_ps);
#define WITH_IMM(imm)                                                                                                  \
    HALVES("permute_ps " #imm, _mm512_permute_ps(A512, imm), _mm256_permute_ps(PS(a, h), imm));                        \
    HALVES("shuffle_ps " #imm, _mm512_shuffle_ps(A512, B512, imm), _mm256_shuffle_ps(PS(a, h), PS(b, h), imm));
    WITH_IMM(0x44) WITH_IMM(0xEE) WITH_IMM(0x88) WITH_IMM(0xDD) WITH_IMM(0xB1) WITH_IMM(0x1B) WITH_IMM(0x93) WITH_IMM(0x72)
    int imm = (int)(bits() & 255);
    HALVES("shuffle_f32x4", _mm512_shuffle_f32x4(A512, B512, imm),
           _mm256_set_m128(_mm_loadu_ps((h ? b : a).f + 4 * (imm >> (4 * h + 2) & 3)),
                           _mm_loadu_ps((h ? b : a).f + 4 * (imm >> 4 * h & 3))));
    HALVES("permutexvar_ps", _mm512_permutexvar_ps(BI512, A512), at_index(&a, SI(b, h)));
    HALVES("permutex2var_ps", _mm512_permutex2var_ps(A512, BI512, C512),
           _mm256_blendv_ps(at_index(&a, SI(b, h)), at_index(&c, SI(b, h)), (__m256)_mm256_slli_epi32(SI(b, h), 27)));
    HALVES("mask_blend_ps", _mm512_mask_blend_ps(k, A512, B512), IF_MASK(h, PS(b, h), PS(a, h)));
    __m128 four = (__m128)QUARTER(b, 0);
    HALVES("mask_broadcast_f32x4", _mm512_mask_broadcast_f32x4(A512, k, four),
           IF_MASK(h, _mm256_set_m128(four, four), PS(a, h)));
    HALVES("broadcast_i32x4", _mm512_broadcast_i32x4((__m128i)four), (__m256)_mm256_set_m128(four, four));
    HALVES("mask_or_epi32", _mm512_mask_or_epi32(AI512, k, BI512, CI512),
           IF_MASK(h, (__m256)_mm256_or_si256(SI(b, h), SI(c, h)), PS(a, h)));
    HALVES("mask_add_epi32", _mm512_mask_add_epi32(AI512, k, BI512, CI512),
           IF_MASK(h, (__m256)_mm256_add_epi32(SI(b, h), SI(c, h)), PS(a, h)));
    HALVES_AS("maskz_mul_ps", 1, _mm512_maskz_mul_ps(k, A512, B512),
           IF_MASK(h, _mm256_mul_ps(PS(a, h), PS(b, h)), _mm256_setzero_ps()));
    HALVES("maskz_loadu_ps", _mm512_maskz_loadu_ps(k, &a), _mm256_maskload_ps(a.f + 8 * h, mask_lanes(h)));
    HALVES("setr_epi32", _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
           _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * h)));
    HALVES("set1_ps", _mm512_set1_ps(a.f[0]), _mm256_set1_ps(a.f[0]));
    HALVES("setzero", _mm512_setzero_ps(), (__m256){0});
    HALVES("setzero", _mm512_setzero_si512(), (__m256i){0});
    HALVES("castps512_ps256", _mm512_castps256_ps512(_mm512_castps512_ps256(A512)), h ? (__m256){0} : PS(a, 0));
    HALVES("extracti64x4", _mm512_castps256_ps512((__m256)_mm512_extracti64x4_epi64(AI512, 1)), h ? (__m256){0} : PS(a, 1));
    _mm_storeu_ps(want.f, (__m128)QUARTER(a, 0));
    memcpy(&got, &(__m512){0}, 64);
    _mm512_storeu_ps(&got, _mm512_castps128_ps512((__m128)QUARTER(a, 0)));
    compare("castps128_ps512", 16, 0);

    for (int i = 0; i < 32; i++) {
        const uint16_t at = ((const uint16_t *)&b)[i];
        ((uint16_t *)&want)[i] = ((const uint16_t *)(at & 32 ? &c : &a))[at & 31];
    }
    _mm512_storeu_si512(&got, _mm512_permutex2var_epi16(AI512, BI512, CI512));
    compare("permutex2var_epi16", 64, 0);

    got = want = c;
    _mm512_mask_storeu_ps(&got, k, A512);
    for (int h = 0; h < 2; h++) _mm256_maskstore_ps(want.f + 8 * h, mask_lanes(h), PS(a, h));
    compare("mask_storeu_ps", 64, 0);
}

/* The manual's table of special cases (rows: a is QNaN, SNaN, infinite, zero, finite), and ldexp for the rest. */
static uint32_t scaled(float x, float n) {
    const uint32_t indefinite = 0xffc00000, infinite = 0x7f800000;
    uint32_t ux, un, sign, result;
    memcpy(&ux, &x, 4);
    memcpy(&un, &n, 4);
    sign = ux & 0x80000000;
    int x_nan = (ux & 0x7fffffff) > infinite, n_nan = (un & 0x7fffffff) > infinite;
    int up = un == infinite, down = un == (infinite | 0x80000000);
    if (x_nan && ux & 0x400000 && (up || down)) return up ? infinite : 0;
    if (x_nan) return ux | 0x400000;
    if (n_nan) return un | 0x400000;
    if ((ux & 0x7fffffff) == infinite) return down ? indefinite : ux;
    if ((ux & 0x7fffffff) == 0) return up ? indefinite : ux;
    if (up || down) return sign | (up ? infinite : 0);
    float y = ldexpf(x, (int)fmin(fmax(floor((double)n), -1000), 1000));
    memcpy(&result, &y, 4);
    return result;
}

/* two multiply-adds with flush-to-zero and denormals-are-zero set: in one asm, since compilers move arithmetic about */
static __m256 dot_bf16(__m256 acc, __m256i x, __m256i y) {
    unsigned before = _mm_getcsr(), flush = before | 0x8040;
    __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __asm__ volatile("vldmxcsr %[flush]\n\tvfmadd231ps %[x1], %[y1], %[acc]\n\tvfmadd231ps %[x0], %[y0], %[acc]\n\t"
                     "vldmxcsr %[before]"
                     : [acc] "+x"(acc)
                     : [x1] "x"(_mm256_and_si256(x, high)), [y1] "x"(_mm256_and_si256(y, high)),
                       [x0] "x"(_mm256_slli_epi32(x, 16)), [y0] "x"(_mm256_slli_epi32(y, 16)), [flush] "m"(flush),
                       [before] "m"(before));
    return acc;
}

/* Products and sums about 2^-126: the exponents of a and b add up to near it, and c's is near it too. */
static void draw_near_the_flush(void) {
    for (int i = 0; i < 32; i++) {
        unsigned e = 40 + bits() % 100, spread = bits() % 4 ? 3 : 26;
        a.h[i] = (uint16_t)((bits() & 0x807f) | e << 7);
        b.h[i] = (uint16_t)((bits() & 0x807f) | (127 + 2 + bits() % spread - e) << 7);
        if (i % 2) c.u[i / 2] = (bits() & (bits() % 2 ? 0x807fffff : 0x80000003)) | (bits() % 4) << 23;
        if (bits() % 4 == 0) a.h[i] &= 0xff80;
        if (bits() % 4 == 0) a.h[i] = 0;
    }
}

static void check_floats(void) {
    FLOATS(max_ps); FLOATS(min_ps);
    HALVES_AS("fmadd_ps", 1, _mm512_fmadd_ps(A512, B512, C512), _mm256_fmadd_ps(PS(a, h), PS(b, h), PS(c, h)));
    HALVES_AS("sqrt_ps", 1, _mm512_sqrt_ps(A512), _mm256_sqrt_ps(PS(a, h)));
    HALVES("abs_ps", _mm512_abs_ps(A512), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), PS(a, h)));
    HALVES("cvtepi32_ps", _mm512_cvtepi32_ps(AI512), _mm256_cvtepi32_ps(SI(a, h)));
    HALVES("cvtps_epi32", _mm512_cvtps_epi32(A512), _mm256_cvtps_epi32(PS(a, h)));
    HALVES("cvttps_epi32", _mm512_cvttps_epi32(A512), _mm256_cvttps_epi32(PS(a, h)));
#define CMP(p)                                                                                                         \
    got.u[0] = _mm512_cmp_ps_mask(A512, B512, p);                                                                      \
    want.d[0] = _mm256_movemask_ps(_mm256_cmp_ps(PS(a, 0), PS(b, 0), p)) |                                             \
                _mm256_movemask_ps(_mm256_cmp_ps(PS(a, 1), PS(b, 1), p)) << 8;                                         \
    compare("cmp_ps_mask " #p, 4, 0);
    CMP(0) CMP(1) CMP(2) CMP(3) CMP(4) CMP(5) CMP(6) CMP(7) CMP(8) CMP(9) CMP(10) CMP(11) CMP(12) CMP(13) CMP(14) CMP(15)
    CMP(16) CMP(17) CMP(18) CMP(19) CMP(20) CMP(21) CMP(22) CMP(23) CMP(24) CMP(25) CMP(26) CMP(27) CMP(28) CMP(29)
    CMP(30) CMP(31)

    want.u[0] = 0;
    for (int i = 0; i < 16; i++) want.u[0] |= (k >> i & 1 && a.u[i] & b.u[i]) << i;
    got.u[0] = _mm512_mask_test_epi32_mask(k, AI512, BI512);
    compare("mask_test_epi32_mask", 4, 0);
    for (int i = 0; i < 16; i++) want.u[i] = scaled(a.f[i], b.f[i]);
    _mm512_storeu_ps(&got, _mm512_scalef_ps(A512, B512));
    compare("scalef_ps", 64, 0);
    for (int i = 0; i < 16; i++) want.u[i] = k >> i & 1 ? scaled(a.f[i], b.f[i]) : 0;
    _mm512_storeu_ps(&got, _mm512_maskz_scalef_ps(k, A512, B512));
    compare("maskz_scalef_ps", 64, 0);
    HALVES("rcp14_ps", _mm512_rcp14_ps(A512), _mm256_div_ps(_mm256_set1_ps(1.0f), PS(a, h)));
#define INFINITE(x) _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), _mm256_set1_ps(INFINITY), _CMP_EQ_OQ)
    HALVES_AS("reduce_ps", 1, _mm512_reduce_ps(A512, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
              _mm256_andnot_ps(INFINITE(PS(a, h)), _mm256_sub_ps(PS(a, h), _mm256_round_ps(PS(a, h), 8))));

    __m256 x = _mm256_add_ps(PS(a, 0), PS(a, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    want.f[0] = _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    got.f[0] = _mm512_reduce_add_ps(A512);
    compare("reduce_add_ps", 4, 1);
}

static void check_halves(void) {
    for (int i = 0; i < 16; i++) want.f[i] = _cvtsh_ss(a.h[i]);
    _mm512_storeu_ps(&got, _mm512_cvtph_ps(SI(a, 0)));
    compare("cvtph_ps", 64, 0);
    for (int i = 0; i < 16; i++) want.h[i] = _cvtss_sh(a.f[i], _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((void *)&got, _mm512_cvtps_ph(A512, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    compare("cvtps_ph", 32, 0);
    for (int i = 0; i < 32; i++) {
        const uint32_t u = i < 16 ? b.u[i] : a.u[i - 16], sign = u & 0x80000000;
        const double x = (u & 0x7f800000) == 0 ? 0 : fabs(i < 16 ? b.f[i] : a.f[i - 16]); /* 8 digits by adding */
        const double unit = x > 0 && isfinite(x) ? ldexp(1, ilogb(x) - 7 + 52) : 1;
        const float rounded = isfinite(x) ? (float)((x + unit) - unit) : (float)x;
        uint32_t bits_of;
        memcpy(&bits_of, &rounded, 4);
        want.h[i] = (uint16_t)(isnan(x) ? u >> 16 | 0x40 : (bits_of | sign) >> 16);
    }
    __m512bh pair = _mm512_cvtne2ps_pbh(A512, B512);
    memcpy(&got, &pair, 64);
    compare("cvtne2ps_pbh", 64, 0);
}

int main(void) {
    for (round_no = 0; round_no < 200000 && failures < 20; round_no++) {
        draw();
        check_integers(bits() % 40);
        check_moves();
        check_floats();
        check_halves();
        for (int near = 0; near < 2; near++) {
            if (near) draw_near_the_flush();
            HALVES_AS("dpbf16_ps", 1, _mm512_dpbf16_ps(C512, (__m512bh)A512, (__m512bh)B512),
                      dot_bf16(PS(c, h), SI(a, h), SI(b, h)));
        }
    }
    printf("AVX-512 in software: %d rounds, %d wrong\n", round_no, failures);
    return failures != 0;
}
