/* Scratch memory of an op, and where it comes from: a workspace that the caller keeps between calls, or malloc.
 *
 * A workspace is a stack. What an op takes it gives back before it returns, last first; what did not fit came from
 * malloc, and the stack, once empty, grows by it: the second call of a shape allocates nothing. One call at a time. */
#ifndef FC_WORKSPACE_H
#define FC_WORKSPACE_H

#include <stddef.h>

#include "forge.h"

/* `bytes` for each of `threads` threads, 64-byte aligned, each slice on its own cache lines. Nonzero: no memory. */
typedef struct {
    char *base;
    size_t stride;
    fc_workspace *from; /* NULL: block is malloc's */
    size_t taken;
    void *block;
    size_t kept_bytes; /* not 0: the next call may have so many of block */
} fc_scratch;
int fc_scratch_alloc(fc_workspace *from, fc_scratch *s, int threads, size_t bytes);
/* The same of what may be large: from 1 MiB on in huge pages, as a workspace is. Without a workspace the last blocks,
 * 64 MiB of them at most, are kept for the next calls: the second of a shape is given no page by the system. */
int fc_scratch_alloc_huge(fc_workspace *from, fc_scratch *s, int threads, size_t bytes);
void fc_scratch_free(fc_scratch *s);
static inline void *fc_scratch_of(const fc_scratch *s, int rank) { return s->base + (size_t)rank * s->stride; }

/* Let whole huge pages of a block be such, where the system has some: for what is read again and again and lies further
 * apart than what the processor remembers of small ones. All of such a page is held once a byte of it is written. */
void fc_use_huge_pages(void *block, size_t bytes);

#endif
