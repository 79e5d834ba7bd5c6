/* Which ISA runs: a list, best first, and one pointer. Chosen at load time by CPUID and XGETBV
 * (__builtin_cpu_supports covers both); FORGE_C_ISA chooses another; that it names none is for the
 * Python border to say. */
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"

extern const struct fc_kernels fc_kernels_base;
#ifdef __x86_64__
extern const struct fc_kernels fc_kernels_avx2, fc_kernels_avx_vnni, fc_kernels_avx512, fc_kernels_avx512_vnni,
    fc_kernels_avx512_vnni_bf16, fc_kernels_avx512_amx;

/* clang's __builtin_cpu_supports does not know f16c. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
#ifdef FC_SOFTWARE_AVX512 /* tools/check_avx512.sh: these tables are AVX2 code then */
#define CPU_HAS(feature) 1
#else
#define CPU_HAS(feature) __builtin_cpu_supports(feature)
#endif
/* Leaf 7.1, which neither compiler's builtin knows in all versions */
static int has_avx_vnni(void) {
    unsigned a, b, c, d;
#ifdef FC_SOFTWARE_AVX512
    return has_avx2();
#endif
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
static int has_avx512(void) {
    return has_avx2() && CPU_HAS("avx512f") && CPU_HAS("avx512bw") && CPU_HAS("avx512dq") && CPU_HAS("avx512vl");
}
static int has_avx512_vnni(void) { return has_avx512() && CPU_HAS("avx512vnni"); }
static int has_avx512_vnni_bf16(void) { return has_avx512_vnni() && CPU_HAS("avx512bf16"); }

#if defined(FC_SOFTWARE_AVX512) || !defined(__linux__)
static int may_use_tiles(void) { return CPU_HAS("avx512f"); }
#else
/* Linux gives a process tiles when it asks, once and for all of its threads; it refuses where it is too old, where a
 * hypervisor hides them, or where some thread has a signal stack that is too small for them. */
static int may_use_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    unsigned a, b, c, d;
    const unsigned tile = 1u << 24, bf16 = 1u << 22, int8 = 1u << 25, all = tile | bf16 | int8;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}
#endif
static int has_avx512_amx(void) {
    static int tiles = -1;
    if (tiles < 0) tiles = has_avx512_vnni_bf16() && may_use_tiles();
    return tiles;
}

/* Intel's vdpbf16ps makes half as many products a cycle as AMD's: no more than float32 multiply-adds of the widened
 * numbers do, which take none for 0. */
static int has_slow_bf16_dot(void) { return has_avx512_vnni_bf16() && __builtin_cpu_is("intel"); }
static int has_fast_bf16_dot(void) { return has_avx512_vnni_bf16() && !__builtin_cpu_is("intel"); }
#endif
static int always(void) { return 1; }

static const struct {
    const struct fc_kernels *table;
    int (*runs_here)(void);
} isas[] = {
#ifdef __x86_64__
    {&fc_kernels_avx512_amx, has_avx512_amx},
    {&fc_kernels_avx512_vnni_bf16, has_fast_bf16_dot},
    {&fc_kernels_avx512_vnni, has_avx512_vnni},
    {&fc_kernels_avx512_vnni_bf16, has_slow_bf16_dot},
    {&fc_kernels_avx512, has_avx512},
    {&fc_kernels_avx_vnni, has_avx_vnni},
    {&fc_kernels_avx2, has_avx2},
#endif
    {&fc_kernels_base, always},
};
enum { NUM_ISAS = sizeof isas / sizeof isas[0] };

const struct fc_kernels *_Atomic fc_k = &fc_kernels_base;

int fc_num_isas(void) { return NUM_ISAS; }

const char *fc_isa_name(int i) { return isas[i].runs_here() ? isas[i].table->isa : NULL; }

const char *fc_isa(void) { return fc_k->isa; }

int fc_version(void) { return FC_VERSION; }

#ifndef FC_BUILD_FLAGS
#define FC_BUILD_FLAGS "flags unknown"
#endif
#ifdef __clang__
#define COMPILER "" /* __VERSION__ already says clang */
#else
#define COMPILER "gcc "
#endif
const char *fc_build(void) { return COMPILER __VERSION__ ", " FC_BUILD_FLAGS; }

int fc_use_isa(const char *name) {
    for (int i = 0; i < NUM_ISAS; i++)
        if (!strcmp(isas[i].table->isa, name) && isas[i].runs_here()) {
            fc_k = isas[i].table;
            return 0;
        }
    return -1;
}

__attribute__((constructor)) static void choose_best(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
#endif
    const char *wanted = getenv("FORGE_C_ISA");
    if (wanted && !fc_use_isa(wanted)) return; /* nothing better is asked for, nor of the system */
    int best = 0;
    while (!isas[best].runs_here()) best++;
    fc_k = isas[best].table;
}
