/* LD_PRELOAD: the n-th allocation that code between two addresses asks for fails. All others are the C library's.
 * glibc only: its own names for the functions need no dlsym, which allocates. */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static uintptr_t lo, hi; /* callers that count */
static long count, fails_at = -1;

void fuzz_range(uintptr_t from, uintptr_t to) { lo = from, hi = to; }

/* Count from 0; let allocation n fail, none if n is negative. The allocations counted before. */
long fuzz_arm(long n) {
    const long before = __atomic_load_n(&count, __ATOMIC_SEQ_CST);
    __atomic_store_n(&fails_at, -1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&count, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&fails_at, n, __ATOMIC_SEQ_CST);
    return before;
}

static int fails(void *caller) {
    const uintptr_t at = (uintptr_t)caller;
    if (at < lo || at >= hi) return 0;
    return __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST) == __atomic_load_n(&fails_at, __ATOMIC_SEQ_CST);
}

#define FAILING(call) (fails(__builtin_return_address(0)) ? (errno = ENOMEM, (void *)0) : (call))

void *malloc(size_t n) { return FAILING(__libc_malloc(n)); }
void *calloc(size_t n, size_t size) { return FAILING(__libc_calloc(n, size)); }
void *realloc(void *p, size_t n) { return FAILING(__libc_realloc(p, n)); }
void *memalign(size_t alignment, size_t n) { return FAILING(__libc_memalign(alignment, n)); }
void *aligned_alloc(size_t alignment, size_t n) { return FAILING(__libc_memalign(alignment, n)); }

int posix_memalign(void **out, size_t alignment, size_t n) {
    void *p = FAILING(__libc_memalign(alignment, n));
    if (!p) return ENOMEM;
    *out = p;
    return 0;
}
