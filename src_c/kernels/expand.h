/* Formats that are not multiplied as they lie: blocks of a panel, one after the other, become what formats.h says that
 * a format expands to, group after group, which is as exact as the block. A leaf a format; above it what a block of it
 * holds, line by line. Column c owns bytes 4c .. 4c + 3 of a line of u; scales have column after column.
 *
 * A plane of b bits: a line of it serves 8 / b lines of u, 4 k each, from its lowest bits on. */

/* Line i of u, what a plane of `bits` has of it, at bit `to`; `part` bytes into the line */
FC_INLINE vu plane_bits(const char *plane, const int bits, ptrdiff_t i, ptrdiff_t part, const int to) {
    const int from = bits * (int)(i % (8 / bits));
    const vu w = (vu)vf_load(plane + i / (8 / bits) * FC_LINE + part);
    return (from > to ? w >> (from - to) : w << (to - from)) & (0x01010101u * ((1u << bits) - 1) << to);
}

/* Lines [first, first + lines) of u into out, from a low plane and perhaps an upper one, looked up if there is a table */
FC_INLINE void expand_lines(char *out, const int lines, ptrdiff_t first, const char *low, const int bits,
                            const char *upper, const int upper_bits, const uint8_t *table) {
#pragma GCC unroll 8
    for (int i = 0; i < lines; i++)
#pragma GCC unroll 4
        for (int part = 0; part < FC_LINE; part += FC_BYTES) {
            vu u = plane_bits(low, bits, first + i, part, 0);
            if (upper_bits) u |= plane_bits(upper, upper_bits, first + i, part, bits);
            if (table) u = vu_look_up(table, u);
            vf_store(out + i * FC_LINE + part, (vf)u);
        }
}

FC_INLINE vf halves_at(const char *halves, int j) {
    return vf_from_f16((const uint16_t *)(const void *)halves + j);
}

/* FC_PANEL float16 values as a line of float32 */
FC_INLINE void expand_halves(char *out, const char *halves) {
    for (int j = 0; j < FC_PANEL; j += FC_N) vf_store(out + j * 4, halves_at(halves, j));
}

/* The line d n of float32: FC_PANEL float16 values d, and integers n of the bytes: signed, or `bits` of them from bit
 * `from` on; negative: -(d n) */
FC_INLINE void expand_products(char *out, const char *d, const char *bytes, const int is_signed, const int from,
                               const int bits, const int negative) {
    for (int j = 0; j < FC_PANEL; j += FC_N) {
        vi n = vi_from_u8((const uint8_t *)bytes + j);
        n = is_signed ? (n ^ 128) - 128 : (n >> from) & (0xff >> (8 - bits));
        const vf product = halves_at(d, j) * vf_from_int(n);
        vf_store(out + j * 4, negative ? -product : product);
    }
}

/* ---- blocks of 32 k, as many as fill lines: a scale or a scale and a minimum for each, in the last line ---- */

/* low plane | upper plane | FC_PANEL float16 scales of each 32 k, or scales and minima of the only one */
FC_INLINE void expand_small(char *out, const char *block, ptrdiff_t blocks, const struct fc_format * f, const int upper_bits,
                            const uint8_t *table) {
    const int groups = f->block_groups, upper_at = groups * f->bits * FC_LINE,
              scales_at = upper_at + groups * upper_bits * FC_LINE;
    for (; blocks > 0; blocks--, block += f->block_lines * FC_LINE)
        for (int g = 0; g < groups; g++, out += fc_expanded_bytes(f)) {
            expand_lines(out, 8, 8 * g, block, f->bits, block + upper_at, upper_bits, table);
            expand_halves(out + 8 * FC_LINE, block + scales_at + g * FC_LINE / 2);
            if (f->minimum_bytes) expand_halves(out + 9 * FC_LINE, block + scales_at + FC_LINE / 2);
        }
}

/* T[q] + 128 and E[q] + 12, see forge_c/formats/ggml.py */
static const uint8_t iq4_table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t fp4_table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* 64 k: 16 lines of bytes | scales of the first 32 k, of the others */
static void expand_q8_0(char *out, const char *block, ptrdiff_t blocks) {
    expand_small(out, block, blocks, &fc_formats[FC_PACKED_Q8_0], 0, NULL);
}
/* 64 k: 8 lines of nibbles | 2 of fifth bits | scales of the first 32 k, of the others */
static void expand_q5_0(char *out, const char *block, ptrdiff_t blocks) {
    expand_small(out, block, blocks, &fc_formats[FC_PACKED_Q5_0], 1, NULL);
}
/* 32 k: 4 lines of nibbles | 1 of fifth bits | scales, minima */
static void expand_q5_1(char *out, const char *block, ptrdiff_t blocks) {
    expand_small(out, block, blocks, &fc_formats[FC_PACKED_Q5_1], 1, NULL);
}
/* 64 k: 8 lines of nibbles | scales of the first 32 k, of the others */
static void expand_iq4_nl(char *out, const char *block, ptrdiff_t blocks) {
    expand_small(out, block, blocks, &fc_formats[FC_PACKED_IQ4_NL], 0, iq4_table);
}

/* 128 k: 16 lines of nibbles | exponents e of each 32 k, a byte each: a scale is 2^(e - 128), whose bits are e - 1 in
 * the place of the exponent, or, subnormal for e = 0 and 1, e + 1 times the least of these two */
static void expand_mxfp4(char *out, const char *block, ptrdiff_t blocks) {
    for (; blocks > 0; blocks--, block += 17 * FC_LINE)
        for (int g = 0; g < 4; g++, out += 9 * FC_LINE) {
            expand_lines(out, 8, 8 * g, block, 4, NULL, 0, fp4_table);
            for (int j = 0; j < FC_PANEL; j += FC_N) {
                const vi e = vi_from_u8((const uint8_t *)block + 16 * FC_LINE + g * FC_PANEL + j), low = e < 2;
                const vi bits = (((e + 1) << 21) & low) | (((e - 1) << 23) & ~low);
                vf_store(out + 8 * FC_LINE + j * 4, (vf)bits);
            }
        }
}

/* ---- blocks of 256 k: a byte for the scale of each group, perhaps one for its minimum, and float16 factors ---- */

/* low plane | upper plane | scales, a line for four groups | minima likewise | FC_PANEL float16 d | and for minima */
FC_INLINE void expand_super(char *out, const char *block, ptrdiff_t blocks, const struct fc_format * f, const int upper_bits,
                            const uint8_t *table) {
    const int lines = f->group / 4, groups = f->block_groups, affine = f->minimum_bytes > 0;
    const int upper_at = 8 * f->bits * FC_LINE, scales_at = upper_at + 8 * upper_bits * FC_LINE,
              minima_at = scales_at + groups * FC_PANEL, d_at = (f->block_lines - 1) * FC_LINE;
    for (; blocks > 0; blocks--, block += f->block_lines * FC_LINE)
        for (int g = 0; g < groups; g++, out += fc_expanded_bytes(f)) {
            expand_lines(out, lines, lines * g, block, f->bits, block + upper_at, upper_bits, table);
            expand_products(out + lines * FC_LINE, block + d_at, block + scales_at + g * FC_PANEL, !affine, 0, 8, 0);
            if (affine)
                expand_products(out + (lines + 1) * FC_LINE, block + d_at + FC_LINE / 2,
                                block + minima_at + g * FC_PANEL, 0, 0, 8, 1);
        }
}

/* 32 lines of nibbles | 2 of scales | 2 of minima | d, d of the minima */
static void expand_q4_k(char *out, const char *block, ptrdiff_t blocks) {
    expand_super(out, block, blocks, &fc_formats[FC_PACKED_Q4_K], 0, NULL);
}
/* 32 lines of nibbles | 8 of fifth bits | 2 of scales | 2 of minima | d, d of the minima */
static void expand_q5_k(char *out, const char *block, ptrdiff_t blocks) {
    expand_super(out, block, blocks, &fc_formats[FC_PACKED_Q5_K], 1, NULL);
}
/* 32 lines of nibbles | 16 of two bits above | 4 of signed scales | d */
static void expand_q6_k(char *out, const char *block, ptrdiff_t blocks) {
    expand_super(out, block, blocks, &fc_formats[FC_PACKED_Q6_K], 2, NULL);
}
/* 16 lines of two bits | 8 of third bits | 4 of signed scales | d */
static void expand_q3_k(char *out, const char *block, ptrdiff_t blocks) {
    expand_super(out, block, blocks, &fc_formats[FC_PACKED_Q3_K], 1, NULL);
}
/* 32 lines of nibbles | 2 of signed scales | d */
static void expand_iq4_xs(char *out, const char *block, ptrdiff_t blocks) {
    expand_super(out, block, blocks, &fc_formats[FC_PACKED_IQ4_XS], 0, iq4_table);
}

/* 16 lines of two bits | 4 of nibbles: a scale, and a minimum in the high one | d, d of the minima */
static void expand_q2_k(char *out, const char *block, ptrdiff_t blocks) {
    for (; blocks > 0; blocks--, block += 21 * FC_LINE)
        for (int g = 0; g < 16; g++, out += 6 * FC_LINE) {
            const char *bytes = block + 16 * FC_LINE + g * FC_PANEL, *d = block + 20 * FC_LINE;
            expand_lines(out, 4, 4 * g, block, 2, NULL, 0, NULL);
            expand_products(out + 4 * FC_LINE, d, bytes, 0, 0, 4, 0);
            expand_products(out + 5 * FC_LINE, d + FC_LINE / 2, bytes, 0, 4, 4, 1);
        }
}
