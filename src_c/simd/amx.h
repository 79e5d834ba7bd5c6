/* Tiles (AMX): eight registers of up to 16 rows of up to 64 bytes, and products of them. Words like those of simd.h, but
 * a tile is named by a literal number, 0 .. 7, as no register can be spilled or passed on:
 *   tiles_begin(shape)           shapes of all tiles; they hold zeros
 *   tiles_end()                  back to a state in which the system need not save them
 *   tile_zero(t)
 *   tile_load(t, p, ld)          row i from p + i ld; tile_load_once: the same, but nothing else needs p's lines soon
 *   tile_store(t, p, ld)
 *   tile_dot_bf16(c, a, b)       c[i][j] += a[i][2k] b[k][2j] + a[i][2k + 1] b[k][2j + 1]  over rows k of b: the even
 *                                values and the odd ones each in a chain of FMAs from 0 in the order of k, then
 *                                c + (even + odd); subnormals count as 0 and become 0, whatever MXCSR says
 *   tile_dot_s8s8(c, a, b)       c[i][j] += sum over k and q < 4 of a[i][4k + q] b[k][4j + q], signed bytes
 *   tile_dot_s8u8(c, a, b)       the same, b's unsigned
 *   tile_dot_u8s8(c, a, b)       the same, a's unsigned
 * c, a and b are different. All are assembly: the compiler's own words for loads and shapes do not say what memory they
 * read, and need no target then. */

/* What LDTILECFG reads: palette 1, and each tile's bytes a row and rows */
struct tile_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

#ifdef FC_SOFTWARE_AVX512
#define tiles_begin(shapes) soft_tiles_begin((shapes)->row_bytes, (shapes)->rows)
#define tiles_end() soft_tiles_end()
#define tile_zero(t) soft_tile_zero(t)
#define tile_load(t, p, ld) soft_tile_load(t, p, ld)
#define tile_load_once(t, p, ld) soft_tile_load(t, p, ld)
#define tile_store(t, p, ld) soft_tile_store(t, p, ld)
#define tile_dot_bf16(c, a, b) soft_tile_dot_bf16(c, a, b)
#define tile_dot_s8s8(c, a, b) soft_tile_dot_s8s8(c, a, b)
#define tile_dot_s8u8(c, a, b) soft_tile_dot_s8u8(c, a, b)
#define tile_dot_u8s8(c, a, b) soft_tile_dot_u8s8(c, a, b)
#else
FC_INLINE void tiles_begin(const struct tile_shapes *shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(*shapes)); }
FC_INLINE void tiles_end(void) { __asm__ volatile("tilerelease" : : : "memory"); }
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t : :)
#define tile_load(t, p, ld)                                                                                            \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((ptrdiff_t)(ld)) : "memory")
#define tile_load_once(t, p, ld)                                                                                       \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #t : : "r"(p), "r"((ptrdiff_t)(ld)) : "memory")
#define tile_store(t, p, ld)                                                                                           \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"((ptrdiff_t)(ld)) : "memory")
#define tile_dot_bf16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define tile_dot_s8s8(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define tile_dot_s8u8(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define tile_dot_u8s8(c, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#endif
