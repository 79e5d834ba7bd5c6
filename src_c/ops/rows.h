/* Walking the rows of arrays that share outer axes but not strides. */
#ifndef FC_ROWS_H
#define FC_ROWS_H

#include <stdint.h>
#include <string.h>

#include "../kernels.h"
#include "../machine.h"
#include "../threads.h"
#include "../workspace.h"

static inline ptrdiff_t fc_smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* Sizes of memory: PTRDIFF_MAX, which no allocation gives, stands for all that is larger. */
static inline ptrdiff_t fc_times(ptrdiff_t a, ptrdiff_t b) {
    ptrdiff_t c;
    return __builtin_mul_overflow(a, b, &c) ? PTRDIFF_MAX : c;
}
static inline ptrdiff_t fc_plus(ptrdiff_t a, ptrdiff_t b) {
    ptrdiff_t c;
    return __builtin_add_overflow(a, b, &c) ? PTRDIFF_MAX : c;
}
static inline ptrdiff_t fc_round_up(ptrdiff_t a, ptrdiff_t unit) {
    return a > PTRDIFF_MAX - unit ? PTRDIFF_MAX : (a + unit - 1) / unit * unit;
}

/* p[i] of a caller's floats, which may lie on any byte */
static inline float fc_get_float(const float *p, ptrdiff_t i) {
    float x;
    memcpy(&x, (const char *)(const void *)p + i * 4, 4);
    return x;
}
static inline void fc_put_float(float *p, ptrdiff_t i, float x) { memcpy((char *)(void *)p + i * 4, &x, 4); }

/* A struct of another size comes from another version of forge.h: its members would be misread. */
#define FC_IS_OURS(p) ((p)->size == sizeof *(p))

typedef struct {
    const fc_rows *rows;
    int listed; /* some array has an index */
    ptrdiff_t index[FC_MAX_AXES];
    ptrdiff_t at[FC_MAX_ARRAYS]; /* byte offset of the row in each array */
} fc_cursor;

static inline ptrdiff_t fc_rows_count(const fc_rows *rows) {
    ptrdiff_t count = 1;
    for (int d = 0; d < rows->ndim; d++) count *= rows->shape[d];
    return count;
}

/* The places of arrays with an index. */
static inline void fc_cursor_look_up(fc_cursor *c) {
    for (int a = 0; a < FC_MAX_ARRAYS; a++)
        if (c->rows->index[a]) c->at[a] = (ptrdiff_t)c->rows->index[a][c->index[0]] * c->rows->stride[a][0];
}

static inline void fc_cursor_at(fc_cursor *c, const fc_rows *rows, ptrdiff_t row) {
    c->rows = rows;
    c->listed = 0;
    for (int a = 0; a < FC_MAX_ARRAYS; a++) {
        c->at[a] = 0;
        c->listed |= rows->ndim == 1 && rows->index[a];
    }
    for (int d = rows->ndim - 1; d >= 0; d--) {
        c->index[d] = row % rows->shape[d];
        row /= rows->shape[d];
        for (int a = 0; a < FC_MAX_ARRAYS; a++) c->at[a] += c->index[d] * rows->stride[a][d];
    }
    if (c->listed) fc_cursor_look_up(c);
}

static inline void fc_cursor_next(fc_cursor *c) {
    for (int d = c->rows->ndim - 1; d >= 0; d--) {
        for (int a = 0; a < FC_MAX_ARRAYS; a++) c->at[a] += c->rows->stride[a][d];
        if (++c->index[d] < c->rows->shape[d]) break;
        for (int a = 0; a < FC_MAX_ARRAYS; a++) c->at[a] -= c->rows->shape[d] * c->rows->stride[a][d];
        c->index[d] = 0;
    }
    if (c->listed) fc_cursor_look_up(c);
}

/* Whether inputs of so many bytes come from beyond the second cache: then the next row is prefetched. */
static inline int fc_reads_beyond_l2(double bytes) { return bytes > (double)fc_beyond_l2(); }

/* Whether a result is so large that no cache keeps it until it is read: then it is written past them, and its lines
 * need not be read first. In place they are there anyway. */
static inline int fc_should_stream(double bytes, int in_place) { return bytes >= (double)fc_stream_from() && !in_place; }

/* to[n] = from[n] * scale, from any storage type to any */
void fc_convert_row(const struct fc_kernels *k, fc_dtype to_type, void *to, fc_dtype from_type, const void *from,
                    ptrdiff_t n, float scale);

#endif
