/* Formats that are not multiplied as they lie: blocks of a panel, one after the other, become what formats.h says that
 * a format expands to, group after group, which is as exact as the block. Column c owns bytes 4c .. 4c + 3 of a line of
 * u; scales have column after column. A block, line by line:
 *
 *     low plane | upper plane | scales of each group, then minima | where these are bytes: float16 factors of them
 *
 * A plane of b bits: a line of it serves 8 / b lines of u, 4 k each, from its lowest bits on. */

/* What there is of a group for each column */
enum block_scales {
    SCALES_F16,       /* float16 scales and, of a block's only group, minima */
    SCALES_BYTES,     /* d n: bytes n, signed if there are no minima, which are -d n */
    SCALES_NIBBLES,   /* the same, the scale's n in a byte's low half, the minimum's in its high one */
    SCALES_EXPONENTS, /* bytes e: 2^(e - 128) */
};

struct block_shape {
    const struct fc_format *f;
    int upper_bits;
    enum block_scales scales;
    const uint8_t *table; /* u is looked up in it; or NULL */
};
typedef const struct block_shape *block_shape; /* a constant wherever it is used */

/* T[q] + 128 and E[q] + 12, see forge_c/formats/ggml.py */
static const uint8_t iq4_table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t fp4_table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

static const struct block_shape shape_q5_0 = {&fc_formats[FC_PACKED_Q5_0], 1, SCALES_F16, NULL},
                                shape_q5_1 = {&fc_formats[FC_PACKED_Q5_1], 1, SCALES_F16, NULL},
                                shape_q8_0 = {&fc_formats[FC_PACKED_Q8_0], 0, SCALES_F16, NULL},
                                shape_q2_k = {&fc_formats[FC_PACKED_Q2_K], 0, SCALES_NIBBLES, NULL},
                                shape_q3_k = {&fc_formats[FC_PACKED_Q3_K], 1, SCALES_BYTES, NULL},
                                shape_q4_k = {&fc_formats[FC_PACKED_Q4_K], 0, SCALES_BYTES, NULL},
                                shape_q5_k = {&fc_formats[FC_PACKED_Q5_K], 1, SCALES_BYTES, NULL},
                                shape_q6_k = {&fc_formats[FC_PACKED_Q6_K], 2, SCALES_BYTES, NULL},
                                shape_iq4_nl = {&fc_formats[FC_PACKED_IQ4_NL], 0, SCALES_F16, iq4_table},
                                shape_iq4_xs = {&fc_formats[FC_PACKED_IQ4_XS], 0, SCALES_BYTES, iq4_table},
                                shape_mxfp4 = {&fc_formats[FC_PACKED_MXFP4], 0, SCALES_EXPONENTS, fp4_table};

/* Bytes of a plane of a block */
FC_INLINE size_t plane_bytes(block_shape s, int bits) {
    return (size_t)(s->f->group * s->f->block_groups * bits) / 8 * FC_PANEL;
}

/* Line i of u, what a plane of `bits` has of it, at bit `to`; `part` bytes into the line */
FC_INLINE vu plane_bits(const char *plane, const unsigned bits, size_t i, size_t part, const unsigned to) {
    const unsigned from = bits * (unsigned)(i % (8 / bits));
    const vu w = (vu)vf_load(plane + i / (8 / bits) * FC_LINE + part);
    return (from > to ? w >> (from - to) : w << (to - from)) & (0x01010101u * ((1u << bits) - 1) << to);
}

/* Groups are taken apart in pairs, which are whole lines of each plane, so that the places in them are constants. */
FC_INLINE size_t groups_at_once(block_shape s) { return s->f->block_groups > 1 ? 2 : 1; }

/* Line i of the u of pair `pair` of groups of a block; `part` bytes into it */
FC_INLINE vu block_line(block_shape s, const char *block, size_t pair, size_t i, size_t part) {
    const unsigned bits = (unsigned)s->f->bits, upper_bits = (unsigned)s->upper_bits;
    const size_t lines = groups_at_once(s) * (size_t)s->f->group / 4;
    const char *upper = block + plane_bytes(s, s->f->bits) + pair * (lines * upper_bits / 8) * FC_LINE;
    vu u = plane_bits(block + pair * (lines * bits / 8) * FC_LINE, bits, i, part, 0);
    if (upper_bits) u |= plane_bits(upper, upper_bits, i, part, bits);
    return s->table ? vu_look_up(s->table, u) : u;
}

/* d n of the vector of columns from j on: float16 d, and integers n of the bytes, signed, or `bits` of them from bit
 * `from` on */
FC_INLINE vf product_of_bytes(const char *d, const char *bytes, size_t j, const int is_signed, const int from,
                              const int bits) {
    const vi n = is_signed ? vi_from_i8(bytes + j)
                           : (vi_from_u8((const uint8_t *)bytes + j) >> from) & (0xff >> (8 - bits));
    return vf_from_f16((const uint16_t *)(const void *)d + j) * vf_from_int(n);
}

/* 2^(e - 128) of FC_N bytes e: its bits are e - 1 in the place of the exponent, or, subnormal for e = 0 and 1, e + 1
 * times the least of these two */
FC_INLINE vf power_of_bytes(const char *bytes) {
    const vi e = vi_from_u8((const uint8_t *)bytes), low = e < 2;
    return (vf)((((e + 1) << 21) & low) | (((e - 1) << 23) & ~low));
}

FC_INLINE const char *scales_of(block_shape s, const char *block) {
    return block + plane_bytes(s, s->f->bits) + plane_bytes(s, s->upper_bits);
}

FC_INLINE const char *factors_of(block_shape s, const char *block) { return block + (s->f->block_lines - 1) * FC_LINE; }

/* Scales of group g, columns j .. j + FC_N - 1 */
FC_INLINE vf block_scale(block_shape s, const char *block, size_t g, size_t j) {
    const char *scales = scales_of(s, block), *d = factors_of(s, block);
    switch (s->scales) {
    case SCALES_F16: return vf_from_f16((const uint16_t *)(const void *)scales + g * FC_PANEL + j);
    case SCALES_BYTES: return product_of_bytes(d, scales + g * FC_PANEL, j, !s->f->minimum_bytes, 0, 8);
    case SCALES_NIBBLES: return product_of_bytes(d, scales + g * FC_PANEL, j, 0, 0, 4);
    case SCALES_EXPONENTS: return power_of_bytes(scales + g * FC_PANEL + j);
    }
    return vf_zero();
}

/* And minima, of a format that has them */
FC_INLINE vf block_minimum(block_shape s, const char *block, size_t g, size_t j) {
    const char *scales = scales_of(s, block), *d = factors_of(s, block) + FC_LINE / 2;
    const size_t groups = (size_t)s->f->block_groups;
    if (s->scales == SCALES_F16) return vf_from_f16((const uint16_t *)(const void *)scales + FC_PANEL + j);
    if (s->scales == SCALES_BYTES) return -product_of_bytes(d, scales + (groups + g) * FC_PANEL, j, 0, 0, 8);
    return -product_of_bytes(d, scales + g * FC_PANEL, j, 0, 4, 4);
}

/* Group n of a pair to its lines of u, the line of float32 scales and that of minima */
FC_INLINE void expand_group(block_shape s, char *out, const char *block, size_t pair, const size_t n) {
    const size_t lines = (size_t)s->f->group / 4, g = pair * groups_at_once(s) + n;
#pragma GCC unroll 8
    for (size_t i = 0; i < lines; i++)
#pragma GCC unroll 4
        for (size_t part = 0; part < FC_LINE; part += FC_BYTES)
            vf_store(out + i * FC_LINE + part, (vf)block_line(s, block, pair, n * lines + i, part));
    out += lines * FC_LINE;
    for (size_t j = 0; j < FC_PANEL; j += FC_N) {
        vf_store(out + j * 4, block_scale(s, block, g, j));
        if (s->f->minimum_bytes) vf_store(out + FC_LINE + j * 4, block_minimum(s, block, g, j));
    }
}

FC_INLINE void expand_blocks(block_shape s, char *out, const char *block, ptrdiff_t blocks) {
    const size_t pairs = (size_t)s->f->block_groups / groups_at_once(s);
    for (; blocks > 0; blocks--, block += s->f->block_lines * FC_LINE)
        for (size_t pair = 0; pair < pairs; pair++)
#pragma GCC unroll 2
            for (size_t n = 0; n < groups_at_once(s); n++, out += fc_expanded_bytes(s->f))
                expand_group(s, out, block, pair, n);
}

#define FC_EXPAND(name, layout)                                                                                        \
    static void expand_##name(char *out, const char *block, ptrdiff_t blocks) {                                        \
        expand_blocks(&shape_##name, out, block, blocks);                                                              \
    }
FC_EXPANSIONS(FC_EXPAND)
