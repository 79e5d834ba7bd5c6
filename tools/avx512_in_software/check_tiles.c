/* Checks this folder's tiles on random ones of all shapes, subnormal numbers and NaN among them: against the manual's
 * pseudo code, its products by the FMA unit set to flush, and, where the CPU and the system have AMX, against the words of
 * src_c/simd/amx.h themselves. Argument: rounds. Prints what is off; exit status 1.
 *     gcc -O2 -mavx2 -mfma -mf16c -Wno-psabi -I. check_tiles.c -lm && ./a.out 1000000 */
#include <immintrin.h>
#include <cpuid.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FC_INLINE static inline
#include "../../src_c/simd/amx.h"

enum { C, A, B, LD = 80 };
typedef struct {
    uint8_t b[16 * LD];
} block; /* rows LD bytes apart */

static block in[3], got, want;
static struct tile_shapes shapes;
static int failures, m, n, k, round_no; /* c (m, n), a (m, k), b (k, n), in units of 4 bytes */

static uint64_t state = 1;
static uint32_t bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

/* Pairs of bfloat16, or a float32: any bits; ordinary; products about 2^-126; zeros, infinities, NaN, subnormal */
static uint32_t number(int kind, int of_c) {
    static const uint16_t special[] = {0, 0x8000, 1, 0x807f, 0x80, 0x7f80, 0xff80, 0x7fc0, 0x7f81, 0x3f80, 0x7f7f};
    const uint32_t r = bits();
    if (kind == 0) return r;
    if (kind == 1 || bits() % 64) {
        const uint32_t e = kind == 1 ? 120 + bits() % 12 : of_c ? bits() % 5 : 60 + bits() % 8;
        const uint32_t f = kind == 1 ? 120 + bits() % 12 : 60 + bits() % 8;
        return of_c ? (r & 0x807fffff) | e << 23 : (r & 0x807f807f) | e << 23 | f << 7;
    }
    return (uint32_t)special[r % 11] << 16 | special[bits() % 11];
}

static void draw(void) {
    const int kind = (int)(bits() % 3);
    m = 1 + (int)(bits() % 16), n = 1 + (int)(bits() % 16), k = 1 + (int)(bits() % 16);
    const int rows[] = {m, m, k}, columns[] = {n, k, n};
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int t = 0; t < 8; t++) {
        shapes.rows[t] = (uint8_t)rows[t % 3];
        shapes.row_bytes[t] = (uint16_t)(columns[t % 3] * 4);
    }
    for (int t = 0; t < 3; t++)
        for (int i = 0; i < 16 * LD; i += 4) {
            const uint32_t u = number(kind, t == C);
            memcpy(in[t].b + i, &u, 4);
        }
    for (int i = 0; i < 16 * LD; i++) want.b[i] = (uint8_t)i;
}

static void compare(const char *name, int floats) {
    for (int i = 0; i < 16 * LD; i += 4) {
        uint32_t x, y;
        memcpy(&x, got.b + i, 4);
        memcpy(&y, want.b + i, 4);
        if (x == y || (floats && (x & 0x7fffffff) > 0x7f800000 && (y & 0x7fffffff) > 0x7f800000)) continue;
        printf("%s, round %d, %d x %d x %d, byte %d: %08x, expected %08x\n", name, round_no, m, n, k, i, x, y);
        failures++;
        return;
    }
}

/* x + y z, or, with y = 1, a sum, with subnormal numbers flushed, in one piece of assembly */
static float fma_flush(float x, float y, float z) {
    unsigned before = _mm_getcsr(), flush = before | 0x8040;
    __asm__ volatile("vldmxcsr %[flush]\n\tvfmadd231ss %[y], %[z], %[x]\n\tvldmxcsr %[before]"
                     : [x] "+x"(x) : [y] "x"(y), [z] "x"(z), [flush] "m"(flush), [before] "m"(before));
    return x;
}
static float half(const block *t, int row, int i) {
    uint16_t h;
    memcpy(&h, t->b + row * LD + 2 * i, 2);
    const uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static void pseudo_bf16(void) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float sum[2] = {0, 0}, c;
            for (int l = 0; l < k; l++)
                for (int p = 0; p < 2; p++)
                    sum[p] = fma_flush(sum[p], half(&in[A], i, 2 * l + p), half(&in[B], l, 2 * j + p));
            memcpy(&c, in[C].b + i * LD + 4 * j, 4);
            c = fma_flush(c, 1.0f, fma_flush(sum[0], 1.0f, sum[1]));
            memcpy(want.b + i * LD + 4 * j, &c, 4);
        }
}
static int byte_of(uint8_t byte, int is_signed) { return is_signed ? (int8_t)byte : byte; }
static void pseudo_bytes(int a_signed, int b_signed) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            uint32_t c;
            memcpy(&c, in[C].b + i * LD + 4 * j, 4);
            for (int l = 0; l < 4 * k; l++) {
                const uint8_t w = in[B].b[l / 4 * LD + 4 * j + l % 4];
                c += (uint32_t)(byte_of(in[A].b[i * LD + l], a_signed) * byte_of(w, b_signed));
            }
            memcpy(want.b + i * LD + 4 * j, &c, 4);
        }
}
static void pseudo_s8s8(void) { pseudo_bytes(1, 1); }
static void pseudo_s8u8(void) { pseudo_bytes(1, 0); }
static void pseudo_u8s8(void) { pseudo_bytes(0, 1); }
static void pseudo_zero(void) {
    for (int i = 0; i < m; i++) memset(want.b + i * LD, 0, (size_t)n * 4);
}

static void start_got(void) {
    for (int i = 0; i < 16 * LD; i++) got.b[i] = (uint8_t)i;
}

#define SOFTWARE(op)                                                                                                   \
    start_got();                                                                                                       \
    soft_tiles_begin(shapes.row_bytes, shapes.rows);                                                                   \
    soft_tile_load(0, in[C].b, LD);                                                                                    \
    soft_tile_load(1, in[A].b, LD);                                                                                    \
    soft_tile_load(2, in[B].b, LD);                                                                                    \
    op;                                                                                                                \
    soft_tile_store(0, got.b, LD);
#define HARDWARE(op)                                                                                                   \
    start_got();                                                                                                       \
    tiles_begin(&shapes);                                                                                              \
    tile_load(0, in[C].b, LD);                                                                                         \
    tile_load_once(1, in[A].b, LD);                                                                                    \
    tile_load(2, in[B].b, LD);                                                                                         \
    op;                                                                                                                \
    tile_store(0, got.b, LD);                                                                                          \
    tiles_end();

static void check(const char *name, void (*pseudo)(void), int floats, void (*software)(void), void (*hardware)(void)) {
    for (int i = 0; i < 16 * LD; i++) want.b[i] = (uint8_t)i;
    pseudo();
    software();
    compare(name, floats);
    if (!hardware) return;
    want = got;
    hardware();
    compare(name, floats);
}

static void soft_bf16(void) { SOFTWARE(soft_tile_dot_bf16(0, 1, 2)) }
static void soft_s8s8(void) { SOFTWARE(soft_tile_dot_s8s8(0, 1, 2)) }
static void soft_s8u8(void) { SOFTWARE(soft_tile_dot_s8u8(0, 1, 2)) }
static void soft_u8s8(void) { SOFTWARE(soft_tile_dot_u8s8(0, 1, 2)) }
static void soft_zero(void) { SOFTWARE(soft_tile_zero(0)) }
static void hard_bf16(void) { HARDWARE(tile_dot_bf16(0, 1, 2)) }
static void hard_s8s8(void) { HARDWARE(tile_dot_s8s8(0, 1, 2)) }
static void hard_s8u8(void) { HARDWARE(tile_dot_s8u8(0, 1, 2)) }
static void hard_u8s8(void) { HARDWARE(tile_dot_u8s8(0, 1, 2)) }
static void hard_zero(void) { HARDWARE(tile_zero(0)) }

static int has_amx(void) {
    unsigned a, b, c, d;
    const unsigned all = 1u << 24 | 1u << 22 | 1u << 25;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 20000, hard = has_amx();
    for (round_no = 0; round_no < rounds && failures < 20; round_no++) {
        draw();
        check("dot_bf16", pseudo_bf16, 1, soft_bf16, hard ? hard_bf16 : NULL);
        check("dot_s8s8", pseudo_s8s8, 0, soft_s8s8, hard ? hard_s8s8 : NULL);
        check("dot_s8u8", pseudo_s8u8, 0, soft_s8u8, hard ? hard_s8u8 : NULL);
        check("dot_u8s8", pseudo_u8s8, 0, soft_u8s8, hard ? hard_u8s8 : NULL);
        check("zero", pseudo_zero, 0, soft_zero, hard ? hard_zero : NULL);
    }
    const char *beside = hard ? " and the instructions" : ", no AMX here";
    printf("tiles in software%s: %d rounds, %d wrong\n", beside, round_no, failures);
    return failures != 0;
}
