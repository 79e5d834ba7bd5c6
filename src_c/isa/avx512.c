/* AVX-512 F, BW, DQ, VL: Skylake-X and later. */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef FC_SOFTWARE_AVX512
#pragma GCC target("avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define FC_ISA "avx512"
#define FC_TABLE fc_kernels_avx512
#define FC_BYTES 64
#define FC_LEAVES "avx512_leaves.h"
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
