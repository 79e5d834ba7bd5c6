/* See machine.h. Cache sizes are asked of Linux, else of the C library, which on AMD's CPUs calls the last caches of all
 * cores together one; where neither knows, or the answer is absurd, a usual size stands. */
#include "machine.h"

#include <fcntl.h>
#include <unistd.h>

static const ptrdiff_t usual[FC_CACHES] = {[FC_CACHE_L2] = 1 << 20, [FC_CACHE_LAST] = 32 << 20};
static const ptrdiff_t least[FC_CACHES] = {[FC_CACHE_L2] = 64 << 10, [FC_CACHE_LAST] = 1 << 20};
static const int level_of[FC_CACHES] = {[FC_CACHE_L2] = 2, [FC_CACHE_LAST] = 3};
static ptrdiff_t found[FC_CACHES], in_use[FC_CACHES];

/* The number at the head of Linux's file `name` about cache `index` of the first core, K as 1024; 0: there is none. */
static ptrdiff_t linux_says(char index, const char *name) {
    char path[64] = "/sys/devices/system/cpu/cpu0/cache/indexN/", text[16] = {0};
    ptrdiff_t n = 0, end = 0;
    while (path[end]) end++;
    path[end - 2] = index;
    while ((path[end] = *name++)) end++;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    const ptrdiff_t got = read(file, text, sizeof text - 1);
    close(file);
    if (got <= 0) return 0;
    const char *c = text;
    for (; *c >= '0' && *c <= '9'; c++) n = n * 10 + (*c - '0');
    return *c == 'K' ? n << 10 : *c == 'M' ? n << 20 : n;
}

static ptrdiff_t ask_linux(int level) {
    for (char index = '0'; index <= '9'; index++)
        if (linux_says(index, "level") == level) return linux_says(index, "size");
    return 0;
}

static ptrdiff_t ask_library(int level) {
#ifdef _SC_LEVEL3_CACHE_SIZE
    return (ptrdiff_t)sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
#else
    (void)level;
    return 0;
#endif
}

__attribute__((constructor)) static void ask_for_caches(void) {
    for (int i = 0; i < FC_CACHES; i++) {
        ptrdiff_t bytes = ask_linux(level_of[i]);
        if (bytes < least[i]) bytes = ask_library(level_of[i]);
        in_use[i] = found[i] = bytes >= least[i] ? bytes : usual[i];
    }
}

ptrdiff_t fc_cache_bytes(fc_cache which) { return __atomic_load_n(&in_use[which], __ATOMIC_RELAXED); }

void fc_set_cache_bytes(fc_cache which, ptrdiff_t bytes) {
    __atomic_store_n(&in_use[which], bytes > 0 ? bytes : found[which], __ATOMIC_RELAXED);
}

ptrdiff_t fc_beyond_l2(void) { return fc_cache_bytes(FC_CACHE_L2) / 2; }

ptrdiff_t fc_stream_from(void) {
    const ptrdiff_t half = fc_cache_bytes(FC_CACHE_LAST) / 2, limit = 16 << 20;
    return half < limit ? half : limit;
}
