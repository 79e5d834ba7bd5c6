/* Formats of matrices in panels: one row each. What a row does not say follows from it; leaves, drivers and the border
 * read it here, forge_c/formats/layout.py mirrors it and holds the picture.
 *
 * A panel is FC_PANEL columns of W, a line k_step of its rows: one column after the other, the k_step numbers of each
 * side by side. A block is the lines of block_groups groups of rows, then, if these have scales, a line with the scale
 * of each group and its minimum, FC_PANEL columns side by side:   W = scale (u - zero) + minimum.
 * Without groups a block is one line, which holds W itself.
 *
 * Formats that expand lie in blocks of block_lines lines, as their leaf in kernels/expand.h says. What is multiplied is
 * what that makes of them, group after group: the group's lines of bytes u, as of int8, a line of FC_PANEL float32
 * scales and, if there are minima, a line of FC_PANEL float32 minima. */
#ifndef FC_FORMATS_H
#define FC_FORMATS_H

#include "forge.h"

enum { FC_PANEL = 16, FC_LINE = 64 }; /* columns; bytes of a cache line, and of a line of weights */
enum { FC_ANY_GROUP = -1 };           /* the weight says how many rows share a scale */

/* What a number of W is multiplied by: the type of x in the product */
typedef enum {
    FC_A_F32,
    FC_A_BF16, /* x rounded to bfloat16 */
    FC_A_I8,   /* integers and a scale for each chunk of k, as the caller wants x rounded */
    FC_A_I16,  /* integers that whoever multiplies has made */
    FC_A_TYPES
} fc_a_type;

/* Into what a format expands: lines of bytes */
typedef enum {
    FC_AS_IT_IS,
    FC_TO_U4, /* a group's sum of them times int8, two products in each lane, fits in 16 bits */
    FC_TO_U6, /* that of half a group does */
    FC_TO_U8
} fc_expansion;

struct fc_format {
    const char *name;
    int packed; /* 0: W comes as it lies, and becomes this on the way */
    int bits;   /* of a number u of W */
    int k_step; /* rows in a line */
    int group;  /* rows that share a scale, FC_ANY_GROUP, or 0: no scales */
    int block_groups;
    int scale_bytes, minimum_bytes; /* of a column and group: 4 float32, 2 float16, 0 none */
    int zero;                       /* the u that stands for 0 */
    fc_a_type a_type;
    fc_expansion expands;
    int block_lines; /* of a format that expands; of others it follows */
};

static const struct fc_format fc_formats[FC_LAYOUTS] = {
    /*                          name      packed bits k_step group groups scale min zero a_type expands lines */
    [FC_PACKED_F32] = {         "float32",        1, 32, 1, 0,            1, 0, 0, 0,   FC_A_F32, FC_AS_IT_IS, 0},
    [FC_PACKED_BF16] = {        "bfloat16",       1, 16, 2, 0,            1, 0, 0, 0,   FC_A_BF16, FC_AS_IT_IS, 0},
    [FC_PACKED_I8] = {          "int8",           1, 8,  4, FC_ANY_GROUP, 1, 4, 0, 128, FC_A_I8, FC_AS_IT_IS, 0},
    [FC_PACKED_I4_SYMMETRIC] = {"int4 symmetric", 1, 4,  8, 32,           2, 2, 0, 8,   FC_A_I8, FC_AS_IT_IS, 0},
    [FC_PACKED_I4_AFFINE] = {   "int4 affine",    1, 4,  8, FC_ANY_GROUP, 1, 2, 2, 0,   FC_A_I8, FC_AS_IT_IS, 0},
    [FC_PACKED_Q4_1] = {        "q4_1",           1, 4,  8, 32,           1, 2, 2, 0,   FC_A_I8, FC_AS_IT_IS, 0},
    [FC_PACKED_Q5_0] = {        "q5_0",           1, 4,  8, 32,           2, 2, 0, 16,  FC_A_I8, FC_TO_U6, 11},
    [FC_PACKED_Q5_1] = {        "q5_1",           1, 4,  8, 32,           1, 2, 2, 0,   FC_A_I8, FC_TO_U6, 6},
    [FC_PACKED_Q8_0] = {        "q8_0",           1, 8,  4, 32,           2, 2, 0, 128, FC_A_I8, FC_TO_U8, 17},
    [FC_PACKED_Q2_K] = {        "q2_k",           1, 2, 16, 16,          16, 1, 1, 0,   FC_A_I8, FC_TO_U4, 21},
    [FC_PACKED_Q3_K] = {        "q3_k",           1, 2, 16, 16,          16, 1, 0, 4,   FC_A_I8, FC_TO_U4, 29},
    [FC_PACKED_Q4_K] = {        "q4_k",           1, 4,  8, 32,           8, 1, 1, 0,   FC_A_I8, FC_TO_U4, 37},
    [FC_PACKED_Q5_K] = {        "q5_k",           1, 4,  8, 32,           8, 1, 1, 0,   FC_A_I8, FC_TO_U6, 45},
    [FC_PACKED_Q6_K] = {        "q6_k",           1, 4,  8, 16,          16, 1, 0, 32,  FC_A_I8, FC_TO_U6, 53},
    [FC_PACKED_IQ4_NL] = {      "iq4_nl",         1, 4,  8, 32,           2, 2, 0, 128, FC_A_I8, FC_TO_U8, 9},
    [FC_PACKED_IQ4_XS] = {      "iq4_xs",         1, 4,  8, 32,           8, 1, 0, 128, FC_A_I8, FC_TO_U8, 35},
    [FC_PACKED_MXFP4] = {       "mxfp4",          1, 4,  8, 32,           4, 1, 0, 12,  FC_A_I8, FC_TO_U6, 17},
    [FC_ROWS] = {               "rows",           0, 32, 1, 0,            1, 0, 0, 0,   FC_A_F32, FC_AS_IT_IS, 0},
    [FC_COLS] = {               "columns",        0, 32, 1, 0,            1, 0, 0, 0,   FC_A_F32, FC_AS_IT_IS, 0},
};

/* int8 keys and values in pages, whose scales belong to tokens and lie elsewhere */
static const struct fc_format fc_page_i8 = {"int8 page", 1, 8, 2, 0, 1, 0, 0, 0, FC_A_I16, FC_AS_IT_IS, 0};

/* What follows from a row, and from the group of a weight */
static inline ptrdiff_t fc_line_bytes(const struct fc_format *f) { return f->k_step * f->bits * FC_PANEL / 8; }
static inline ptrdiff_t fc_scale_lines(const struct fc_format *f) {
    return f->block_groups * (f->scale_bytes + f->minimum_bytes) * FC_PANEL / FC_LINE;
}
static inline ptrdiff_t fc_group_k(const struct fc_format *f, ptrdiff_t group) {
    return f->group == FC_ANY_GROUP ? group : f->group ? f->group : f->k_step;
}
static inline ptrdiff_t fc_block_k(const struct fc_format *f, ptrdiff_t group) {
    return fc_group_k(f, group) * f->block_groups;
}
static inline ptrdiff_t fc_block_bytes(const struct fc_format *f, ptrdiff_t group) {
    if (f->expands) return f->block_lines * FC_LINE;
    return fc_block_k(f, group) / f->k_step * fc_line_bytes(f) + fc_scale_lines(f) * FC_LINE;
}
/* Of a group of a panel as it is multiplied, after expansion: u, scales, minima */
static inline ptrdiff_t fc_expanded_bytes(const struct fc_format *f) {
    return (f->group / 4 + 1 + (f->minimum_bytes > 0)) * FC_LINE;
}

#endif
