/* The error of simd.h's elementary functions, and of the activations, at every finite float32.
 * tools/measure_ulp.sh builds this for each size of vectors and runs it. A function is a line of FUNCTIONS; arguments are
 * the names of those to measure, by default all, and a number n for every n-th thousand of floats only.
 *
 * The exact result y is libm's in float64. An ulp is the distance between the float32 numbers around y: 2^(e - 23)
 * where 2^e <= |y| < 2^(e + 1), but 2^-149 where |y| < 2^-126. A result that is y rounded to float32 has the error 0
 * here, not one up to 0.5: so infinity is right past the largest float32, and infinitely wrong before it, as NaN is. */
#ifdef __x86_64__
#include <immintrin.h>
#if FC_BYTES == 64 && !defined FC_SOFTWARE_AVX512
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#elif FC_BYTES >= 32
#pragma GCC target("avx2,fma,f16c")
#endif
#endif
#include <stdio.h>
#include <stdlib.h>

#include "simd.h"

#include "kernels.h"
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/stream.h"
#include "kernels/activations.h"

enum { BLOCK = 1024 }; /* numbers of one sign and exponent */

/* libm takes its time over results that do not fit float64, and they all mean 0 or infinity here. */
static double e_to(double x) { return exp(x > 700 ? 700 : x < -700 ? -700 : x); }

/* softmax of (x, 0), as kernels/softmax.h makes it: the first of the two */
FC_INLINE vf first_of_two(vf x) {
    vf top = vf_max(x, vf_zero()), e = vf_exp_negative(x - top);
    return e * (vf_set1(1.0f) / (e + vf_exp_negative(-top)));
}

/* F(name, largest x, ours, exact) */
#define FUNCTIONS(F)                                                                                                   \
    F(exp, INFINITY, vf_exp(x), e_to(x))                                                                               \
    F(exp_negative, 0, vf_exp_negative(x), e_to(x))                                                                    \
    F(exp_negative_short, 0, vf_exp_negative_short(x), e_to(x))                                                        \
    F(exp2_negative, 0, vf_exp2_negative(x), exp2(x))                                                                  \
    F(exp2, INFINITY, vf_exp2(x), exp2(x))                                                                             \
    F(softplus, INFINITY, vf_softplus(x), x > 40 ? x : log1p(e_to(x)))                                                 \
    F(sigmoid, INFINITY, vf_times_sigmoid(vf_set1(1.0f), x), 1 / (1 + e_to(-x)))                                       \
    F(softmax, INFINITY, first_of_two(x), 1 / (1 + e_to(-x)))                                                          \
    F(tanh, INFINITY, vf_tanh(x), tanh(x))                                                                             \
    F(silu, INFINITY, vf_activate(FC_SILU, x), x / (1 + e_to(-x)))                                                     \
    F(gelu, INFINITY, vf_activate(FC_GELU, x), 0.5 * x * erfc(-x * M_SQRT1_2))                                         \
    F(gelu_bf16, INFINITY, vf_activate_short(FC_GELU, FC_BF16, x), 0.5 * x * erfc(-x * M_SQRT1_2))                     \
    F(gelu_tanh, INFINITY, vf_activate(FC_GELU_TANH, x),                                                               \
      x / (1 + e_to(-2 * M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x))))

#define DEFINE(name, largest_x, ours, exact)                                                                           \
    static void name##_ours(float *got, const float *p) {                                                              \
        for (int i = 0; i < BLOCK; i += FC_N) {                                                                        \
            const vf x = vf_load(p + i);                                                                               \
            vf_store(got + i, ours);                                                                                   \
        }                                                                                                              \
    }                                                                                                                  \
    static void name##_exact(double *y, const float *p) {                                                              \
        for (int i = 0; i < BLOCK; i++) {                                                                              \
            const double x = p[i];                                                                                     \
            y[i] = exact;                                                                                              \
        }                                                                                                              \
    }
FUNCTIONS(DEFINE)

#define ENTRY(name, largest_x, ours, exact) {#name, largest_x, name##_ours, name##_exact},
static const struct function {
    const char *name;
    float largest_x;
    void (*ours)(float *got, const float *x); /* got[BLOCK], x[BLOCK] */
    void (*exact)(double *y, const float *x); /* y[BLOCK], x[BLOCK] */
} functions[] = {FUNCTIONS(ENTRY)};
enum { N = sizeof functions / sizeof functions[0] };

static int wanted[N]; /* 0: a function that was not asked for */

/* An exponential on the way to |y| < 2^-119 may be subnormal, and then has fewer bits than a float32. */
enum { NORMAL, SMALL, SUBNORMAL, OF_X, MEASURES };
static const char *const headings[] = {"ulp, y from 2^-119", "from 2^-126", "below", "error / (2^-24 x)"};

struct errors {
    struct largest {
        double value;
        uint32_t x; /* the bits of the first x where it is */
    } largest[MEASURES];
    int64_t right, numbers; /* of 2^-8 <= |x| < 16: results that are y rounded, and all */
};

static void raise_to(struct largest *a, double value, uint32_t x) {
    if (value > a->value || (value == a->value && x < a->x)) *a = (struct largest){value, x};
}

/* Counting is to be quick: in vectors of the compiler's making, and in AVX2 what SSE2 has computed. */
#pragma GCC optimize("O3,no-trapping-math")
#if defined __x86_64__ && FC_BYTES == 16
#pragma GCC target("avx2")
#endif

FC_INLINE double error_of(float got, double y) { return got == (float)y ? 0 : fabs(got - y); }
FC_INLINE double per_ulp(double y) { /* 2^(23 - e) */
    double size = fabs(y);
    size = size < 0x1p-126 ? 0x1p-126 : size;
    size = size > 0x1p127 ? 0x1p127 : size;
    uint64_t bits;
    memcpy(&bits, &size, 8);
    bits = ((UINT64_C(23) + 2 * 1023) << 52) - (bits & UINT64_C(0x7ff) << 52);
    memcpy(&size, &bits, 8);
    return size;
}

/* x[BLOCK], got[BLOCK], y[BLOCK]; first: the bits of x[0] */
static void count(struct errors *e, uint32_t first, const float *x, const float *got, const double *y) {
    const double normal = e->largest[NORMAL].value, small = e->largest[SMALL].value;
    const double subnormal = e->largest[SUBNORMAL].value, of_x = e->largest[OF_X].value * 0x1p-24;
    int64_t right = 0, higher = 0;
#pragma omp simd reduction(+ : right) reduction(| : higher)
    for (int i = 0; i < BLOCK; i++) {
        const double error = error_of(got[i], y[i]), size = fabs(y[i]);
        const double limit = size >= 0x1p-119 ? normal : size >= 0x1p-126 ? small : subnormal;
        right += got[i] == (float)y[i];
        higher |= !(error * per_ulp(y[i]) <= limit) | !(error <= of_x * fabsf(x[i]));
    }
    if (fabsf(x[0]) >= 0x1p-8f && fabsf(x[0]) < 16) e->right += right, e->numbers += BLOCK;
    for (int i = 0; higher && i < BLOCK; i++) {
        const double error = isnan(got[i]) ? INFINITY : error_of(got[i], y[i]), size = fabs(y[i]);
        raise_to(&e->largest[size >= 0x1p-119 ? NORMAL : size >= 0x1p-126 ? SMALL : SUBNORMAL], error * per_ulp(y[i]),
                 first + (uint32_t)i);
        if (size >= 0x1p-126) raise_to(&e->largest[OF_X], error / fabs(x[i]) * 0x1p24, first + (uint32_t)i);
    }
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static void over_all_floats(struct errors *total, int every) {
#pragma omp parallel
    {
        struct errors mine[N] = {0};
        float x[BLOCK], got[BLOCK];
        double y[BLOCK];
#pragma omp for schedule(static, 64)
        for (int block = 0; block < (1 << 30) / BLOCK * 4; block++) {
            const uint32_t first = (uint32_t)block * BLOCK;
            if (block % every || !isfinite(float_of(first))) continue;
            for (uint32_t i = 0; i < BLOCK; i++) x[i] = float_of(first + i);
            for (int f = 0; f < N; f++) {
                if (!wanted[f] || fmaxf(x[0], x[BLOCK - 1]) > functions[f].largest_x) continue;
                functions[f].ours(got, x);
                functions[f].exact(y, x);
                count(&mine[f], first, x, got, y);
            }
        }
#pragma omp critical
        for (int f = 0; f < N; f++) {
            for (int k = 0; k < MEASURES; k++)
                raise_to(&total[f].largest[k], mine[f].largest[k].value, mine[f].largest[k].x);
            total[f].right += mine[f].right, total[f].numbers += mine[f].numbers;
        }
    }
}

int main(int argc, char **argv) {
    static struct errors total[N];
    const int every = argc > 1 && atoi(argv[1]) > 0 ? atoi(argv[1]) : 1, names = argc > 1 && atoi(argv[1]) > 0 ? 2 : 1;
    for (int f = 0; f < N; f++) {
        wanted[f] = argc <= names;
        for (int i = names; i < argc; i++) wanted[f] |= !strcmp(argv[i], functions[f].name);
    }
    over_all_floats(total, every);
    printf("| vectors of %d bytes | right |", FC_BYTES);
    for (int k = 0; k < MEASURES; k++) printf(" %s | at x |", headings[k]);
    printf("\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
    for (int f = 0; f < N; f++) {
        if (!wanted[f]) continue;
        printf("| %s | %.1f %% |", functions[f].name, 100.0 * (double)total[f].right / (double)total[f].numbers);
        for (int k = 0; k < MEASURES; k++)
            printf(" %.4g | %.9g |", total[f].largest[k].value, (double)float_of(total[f].largest[k].x));
        printf("\n");
    }
    return 0;
}
