/* See workspace.h. */
#include "workspace.h"

#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { HUGE_PAGE = 2 << 20, KEPT_BLOCKS = 4, LEAST_KEPT = 128 << 10, KEPT_BYTES = 64 << 20 };

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

/* At least *bytes, which become those that there are, on whole cache lines from *base on, in whole huge pages if asked;
 * what is returned is free's. NULL: no memory. */
static void *block_of(size_t *bytes, int huge, char **base) {
    const size_t line = huge ? HUGE_PAGE : 64;
    *bytes = (*bytes + line - 1) / line * line;
    char *block = malloc(*bytes + line);
    *base = (char *)(((uintptr_t)block + line - 1) / line * line);
    if (block && huge) fc_use_huge_pages(*base, *bytes);
    return block;
}

/* ---- large scratch that calls without a workspace gave back, for the next ones ---- */

/* Lies in the first bytes of what is kept: to have pages cleared by the system takes longer than many a product. */
struct kept {
    void *block; /* malloc's */
    size_t bytes;
};
static struct kept *kept[KEPT_BLOCKS];
static size_t kept_bytes; /* also of what is about to be kept */
static unsigned turn;     /* the slot that is emptied next */

static void release(struct kept *k) {
    if (!k) return;
    __atomic_fetch_sub(&kept_bytes, k->bytes, __ATOMIC_RELAXED);
    free(k->block);
}

static struct kept *take_slot(int i) { return __atomic_exchange_n(&kept[i], NULL, __ATOMIC_ACQ_REL); }

static void release_next(void) {
    release(take_slot((int)(__atomic_fetch_add(&turn, 1, __ATOMIC_RELAXED) % KEPT_BLOCKS)));
}

static int fill_slot(int i, struct kept *k) {
    struct kept *empty = NULL;
    return __atomic_compare_exchange_n(&kept[i], &empty, k, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* Any that holds so many bytes, now the caller's; NULL: none */
static struct kept *take_kept(size_t bytes) {
    for (int i = 0; i < KEPT_BLOCKS; i++) {
        struct kept *k = take_slot(i);
        if (k && k->bytes >= bytes) {
            __atomic_fetch_sub(&kept_bytes, k->bytes, __ATOMIC_RELAXED);
            return k;
        }
        if (k && !fill_slot(i, k)) release(k);
    }
    return NULL;
}

/* What was kept before goes where there is no room for both. */
static void keep(void *block, char *base, size_t bytes) {
    struct kept *k = (struct kept *)(void *)base;
    *k = (struct kept){block, bytes};
    __atomic_fetch_add(&kept_bytes, bytes, __ATOMIC_RELAXED);
    for (int tries = 0; tries <= KEPT_BLOCKS && bytes <= KEPT_BYTES; tries++, release_next())
        for (int i = 0; i < KEPT_BLOCKS && __atomic_load_n(&kept_bytes, __ATOMIC_RELAXED) <= KEPT_BYTES; i++)
            if (fill_slot(i, k)) return;
    release(k);
}

static int kept_block(fc_scratch *s, size_t bytes, int huge) {
    struct kept *k = take_kept(bytes);
    s->kept_bytes = k ? k->bytes : bytes;
    s->block = k ? k->block : block_of(&s->kept_bytes, huge, &s->base);
    if (k) s->base = (char *)k;
    for (int i = 0; i < KEPT_BLOCKS && !s->block; i++) {
        release_next();
        s->block = block_of(&s->kept_bytes, huge, &s->base);
    }
    return s->block ? 0 : -1;
}

/* ---- slices of a stack, or of a block ---- */

/* Of an empty stack. Without memory it stays as it was. */
static void grow(fc_workspace *w) {
    size_t capacity = 4096;
    while (capacity < w->wanted && capacity <= SIZE_MAX / 4) capacity *= 2;
    char *base, *block = block_of(&capacity, capacity >= HUGE_PAGE, &base);
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

static int alloc(fc_workspace *from, fc_scratch *s, int threads, size_t bytes, int large) {
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
    if (large && !from && total >= LEAST_KEPT) return kept_block(s, total, total >= HUGE_PAGE / 2);
    s->block = block_of(&total, large && total >= HUGE_PAGE / 2, &s->base);
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
    return alloc(from, s, threads, bytes, 1);
}

void fc_scratch_free(fc_scratch *s) {
    if (s->from) s->from->used -= s->taken;
    if (s->block && s->kept_bytes) keep(s->block, s->base, s->kept_bytes);
    else free(s->block);
    *s = (fc_scratch){0};
}
