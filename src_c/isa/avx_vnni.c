/* AVX2 with the dot products of VNNI in 256 bits: Alder Lake and later clients, Zen 5. */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef FC_SOFTWARE_AVX512
#pragma GCC target("avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define FC_ISA "avx_vnni"
#define FC_TABLE fc_kernels_avx_vnni
#define FC_BYTES 32
#define FC_HAS_I8_DOT 1
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
