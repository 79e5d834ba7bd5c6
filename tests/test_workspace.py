"""A model's step allocates nothing: counted by a shim in the place of malloc and its kin, in a process of its own."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from child import compile_c

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static long count;
static void see(void *caller) {
    Dl_info info;
    if (dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "libforge_c")) count++;
}
long allocations(void) { return count; }
void *malloc(size_t n) { see(__builtin_return_address(0)); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { see(__builtin_return_address(0)); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { see(__builtin_return_address(0)); return __libc_realloc(p, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    see(__builtin_return_address(0));
    *p = __libc_memalign(a, n);
    return 0;
}
void *aligned_alloc(size_t a, size_t n) { see(__builtin_return_address(0)); return __libc_memalign(a, n); }
"""
STEPS = """
import ctypes, sys, numpy as np, forge_c as fc
shim = ctypes.CDLL(sys.argv[1])
shim.allocations.restype = ctypes.c_long
fc.set_num_threads(int(sys.argv[2]))
model = fc.models.random_model("llama-tiny", sys.argv[3])
cache = model.new_cache(2, 400)
before = shim.allocations()
model(np.ones((2, 30), np.int64), cache)
first = shim.allocations() - before
for _ in range(3):
    model([[1], [2]], cache)
settled = shim.allocations()
for _ in range(100):
    model([[1], [2]], cache)
print(first, shim.allocations() - settled)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    compile_c("-shared", "-fPIC", "-o", library, source, "-ldl")
    return library


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_allocates_nothing_once_its_shape_was_seen(shim, threads, dtype):
    """The first calls do: the count sees them."""
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    done = subprocess.run([sys.executable, "-c", STEPS, str(shim), str(threads), dtype], env=environment,
                          capture_output=True, text=True, check=True)
    first, later = map(int, done.stdout.split())
    assert first > 0 and later == 0
