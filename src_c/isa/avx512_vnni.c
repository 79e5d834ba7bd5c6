/* AVX-512 with VNNI, bfloat16 by widening: Cascade Lake, Ice Lake, and what Intel has made since, whose products of
 * bfloat16 pairs are no faster than float32 ones of the same numbers. */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef FC_SOFTWARE_AVX512
#pragma GCC target("avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#define FC_ISA "avx512_vnni"
#define FC_TABLE fc_kernels_avx512_vnni
#define FC_BYTES 64
#define FC_HAS_I8_DOT 1
#define FC_LEAVES "avx512_leaves.h"
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
