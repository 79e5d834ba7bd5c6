/* AVX-512 with VNNI, BF16 and AMX tiles of both: Sapphire Rapids and later. bfloat16 products are the tiles' alone:
 * vdpbf16ps would add in another order. */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef FC_SOFTWARE_AVX512
#pragma GCC target("avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif
#define FC_ISA "avx512_amx"
#define FC_TABLE fc_kernels_avx512_amx
#define FC_BYTES 64
#define FC_HAS_TILES 1
#define FC_HAS_I8_DOT 1
#define FC_LEAVES "avx512_leaves.h"
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
