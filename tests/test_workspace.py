"""Scratch memory. A model's step allocates nothing: counted by a shim in the place of malloc and its kin, in a process
of its own. What no address reaches is refused."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from child import compile_c, run_c, run_script
from suite import case

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
for dtype in ("float32", "bfloat16", "int8", "int4"):
    model = fc.models.random_model("llama-tiny", dtype)
    for threads in (1, 2):
        fc.set_num_threads(threads)
        cache = model.new_cache(2, 400)
        before = shim.allocations()
        model(np.ones((2, 30), np.int64), cache)
        first = shim.allocations() - before
        for _ in range(3):
            model([[1], [2]], cache)
        settled = shim.allocations()
        for _ in range(100):
            model([[1], [2]], cache)
        print(dtype, threads, first, shim.allocations() - settled)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    compile_c("-shared", "-fPIC", "-o", library, source, "-ldl")
    return library


def test_a_step_allocates_nothing_once_its_shape_was_seen(shim):
    """The first calls do: the count sees them."""
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    done = subprocess.run([sys.executable, "-c", STEPS, str(shim)], env=environment, capture_output=True, text=True,
                          check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        with case(line):
            first, later = map(int, line.split()[2:])
            assert first > 0 and later == 0


KEPT = """
import resource, sys, threading, numpy as np, forge_c as fc

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10

others = [np.ones(1 << 20, np.float32) for _ in range(4)]
for dtype in ("float32", "bfloat16", "int8"):
    for m, k, n in ((2048, 4096, 64), (300, 3000, 1000), (64, 1024, 1024)):
        x, w = np.ones((m, k), np.float32), fc.pack(np.ones((k, n), np.float32), dtype)
        out = np.zeros((m, n), np.float32)
        for threads in (1, 2):
            fc.set_num_threads(threads)
            taken = []
            for _ in range(4):
                before = faults()
                fc.linear(x, w, out=out)
                taken.append(faults() - before)
            assert np.abs(out - k).max() < 0.01 * k
            print("calls", dtype, m, k, n, threads, *taken)

x, w = np.ones((1, 4096), np.float32), fc.pack(np.ones((4096, 64), np.float32))
for rows in (1 << 10, 5 << 10):
    many, out = np.broadcast_to(x, (rows, 4096)), np.zeros((rows, 64), np.float32)
    before = anonymous()
    calls = [threading.Thread(target=fc.linear, args=(many, w), kwargs={"out": out}) for _ in range(4)]
    [call.start() for call in calls], [call.join() for call in calls]
    assert (out == 4096).all()
    print("kept", rows, anonymous() - before)
"""


def test_the_second_call_of_a_shape_is_given_no_page_and_what_is_kept_has_a_bound():
    """Without a workspace, beside other arrays; calls at once, of more than may be kept, leave 64 MiB at most."""
    lines = [line.split() for line in run_script(KEPT).splitlines()]
    calls, kept = ([line[1:] for line in lines if line[0] == what] for what in ("calls", "kept"))
    assert len(calls) == 18 and len(kept) == 2
    for line in calls:
        with case(*line):
            assert min(map(int, line[-3:])) < 20
    for rows, grown in kept:
        with case(rows):
            assert int(grown) < (64 << 20) + (8 << 20)


TOO_LARGE = r"""
#include <stdio.h>
#include "forge.h"
#define REFUSES(call) \
    do { if ((call) != FC_NO_MEMORY) return printf("%s takes them\n", #call), 1; } while (0)

int main(void) {
    float x[64] = {1};
    const ptrdiff_t large = (ptrdiff_t)1 << 60;
    const fc_rows rows = {.size = sizeof rows, .ndim = 1, .shape = {(ptrdiff_t)1 << 33}};
    for (fc_layout layout = 0; layout < FC_LAYOUTS; layout++) {
        const fc_linear_args l = {.size = sizeof l, .type = FC_F16, .out = x, .x = x, .rows = &rows, .layout = layout,
                                  .m = (ptrdiff_t)1 << 33, .k = (ptrdiff_t)1 << 31, .n = 1, .weight = x, .group = 32};
        REFUSES(fc_linear(&l));
    }

    int64_t start = 0;
    const fc_model wide = {.hidden = large};
    fc_forward_args f = {.size = sizeof f, .model = &wide, .x = x, .batch = 1, .seq = 2, .start = &start};
    REFUSES(fc_forward(&f));

    void *states[1] = {NULL};
    const fc_mlp_weights mlp = {.inner = large};
    const fc_attention_weights attention = {.heads = large / 8, .kv_heads = 1, .head_dim = 8};
    const fc_layer layers[] = {{.mlp = {.kind = FC_MLP, .weights = &mlp}, .residual_scale = 1},
                               {.mlp = {.kind = FC_GATED_MLP, .weights = &mlp}, .residual_scale = 1},
                               {.mixer = {.kind = FC_ATTENTION, .weights = &attention}, .residual_scale = 1}};
    for (int i = 0; i < 3; i++) {
        const fc_model model = {.hidden = 16, .layers = layers + i, .n_layers = 1};
        f = (fc_forward_args){.size = sizeof f, .model = &model, .states = states, .x = x, .batch = 1, .seq = 4,
                              .start = &start};
        REFUSES(fc_forward(&f));
    }
    return 0;
}
"""


def test_scratch_whose_bytes_no_size_holds_is_no_memory(tmp_path):
    """Their product would wrap to few bytes, or none."""
    assert run_c(tmp_path, TOO_LARGE) == (0, "")
