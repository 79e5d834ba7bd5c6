/* See workspace.h. */
#include "workspace.h"

#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { HUGE_PAGE = 2 << 20 };

struct fc_workspace {
    char *block, *base;
    size_t capacity, used;
    size_t wanted; /* the most that was in use at once, malloc's share included */
};

fc_workspace *fc_workspace_new(void) { return calloc(1, sizeof(fc_workspace)); }

void fc_workspace_free(fc_workspace *w) {
    if (w) free(w->block);
    free(w);
}

size_t fc_workspace_bytes(const fc_workspace *w) { return w->capacity; }

void fc_use_huge_pages(void *block, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t from = ((uintptr_t)block + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t to = ((uintptr_t)block + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (from < to) (void)madvise((void *)from, to - from, MADV_HUGEPAGE); /* refused: small pages do */
#else
    (void)block, (void)bytes;
#endif
}

/* At least `bytes` on whole cache lines from *base on, in huge pages if asked and if it fills some; what is returned is
 * free's. NULL: no memory. */
static void *block_of(size_t bytes, int huge, char **base) {
    const size_t line = huge && bytes >= HUGE_PAGE ? HUGE_PAGE : 64, whole = (bytes + line - 1) / line * line;
    char *block = malloc(whole + line);
    *base = (char *)(((uintptr_t)block + line - 1) / line * line);
    if (block && line == HUGE_PAGE) fc_use_huge_pages(*base, whole);
    return block;
}

/* Of an empty stack. Without memory it stays as it was. */
static void grow(fc_workspace *w) {
    size_t capacity = 4096;
    while (capacity < w->wanted && capacity <= SIZE_MAX / 4) capacity *= 2;
    char *base, *block = block_of(capacity, 1, &base);
    if (!block) return;
    free(w->block);
    w->block = block, w->base = base, w->capacity = capacity;
}

/* A spare line between slices, and never a multiple of 4096: equal low bits would collide in L1. */
static int total_bytes(size_t *stride, size_t *total, int threads, size_t bytes) {
    if (bytes > SIZE_MAX / 2) return -1;
    *stride = (bytes + 127) / 64 * 64;
    if (*stride % 4096 == 0) *stride += 64;
    return __builtin_mul_overflow((size_t)threads, *stride, total) || *total > SIZE_MAX / 2;
}

static int alloc(fc_workspace *from, fc_scratch *s, int threads, size_t bytes, int huge) {
    size_t total;
    *s = (fc_scratch){0};
    if (total_bytes(&s->stride, &total, threads, bytes)) return -1;
    if (from) {
        if (from->used == 0 && from->wanted > from->capacity) grow(from);
        const size_t at = from->used;
        from->used += total;
        if (from->used > from->wanted) from->wanted = from->used;
        s->from = from, s->taken = total;
        if (from->used <= from->capacity) {
            s->base = from->base + at;
            return 0;
        }
    }
    s->block = block_of(total, huge, &s->base);
    if (!s->block) {
        fc_scratch_free(s);
        return -1;
    }
    return 0;
}

int fc_scratch_alloc(fc_workspace *from, fc_scratch *s, int threads, size_t bytes) {
    return alloc(from, s, threads, bytes, 0);
}

int fc_scratch_alloc_huge(fc_workspace *from, fc_scratch *s, int threads, size_t bytes) {
    return alloc(from, s, threads, bytes, bytes >= HUGE_PAGE / 2);
}

void fc_scratch_free(fc_scratch *s) {
    if (s->from) s->from->used -= s->taken;
    free(s->block);
    *s = (fc_scratch){0};
}
