/* AVX2 with FMA and F16C: Haswell, Zen and later. */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FC_ISA "avx2"
#define FC_TABLE fc_kernels_avx2
#define FC_BYTES 32
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
