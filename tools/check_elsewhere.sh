#!/usr/bin/env bash
# On any x86-64 or aarch64 Linux, offline: builds from the tree, checks the C kernels, runs the suite on all cores and the
# kernel suites on every ISA there is, and prints a table of speeds. The last line says pass, or what failed. Takes what
# PYTHON (default: python3) can import: without pytest-xdist the suite takes one core, without torch and onnxruntime the
# table has fewer columns; what the package itself needs must be there. 16 cores take less than eight minutes.
# Arguments are test files to run instead of all, and on every ISA.
set -uo pipefail
python=${PYTHON:-python3}
[[ $python == /* || $python != */* ]] || python=$PWD/$python # the tests run in another folder
cd "$(dirname "$0")/.."
built=$PWD/build/elsewhere
failed=()
notes=()
kernels=(test_rms_norm.py test_layer_norm.py test_softmax.py test_activations.py test_elementary.py test_rope.py
         test_embedding.py test_linear.py test_quantized.py test_attention.py test_attention_cache.py test_merge_attention.py
         test_kv_cache.py test_causal_conv1d.py test_selective_scan.py test_ssd_scan.py test_gated_delta.py test_s4d.py
         test_rg_lru.py test_mixture_of_depths.py)
[ $# -eq 0 ] || kernels=("$@")
selected=("${@:-.}")

finish() {
    [ ${#notes[@]} -eq 0 ] || printf 'check_elsewhere: %s\n' "${notes[@]}"
    if [ ${#failed[@]} -eq 0 ]; then echo "check_elsewhere: pass ($SECONDS s)"; exit 0; fi
    local all
    all=$(printf ', %s' "${failed[@]}")
    echo "check_elsewhere: FAILED: ${all:2} ($SECONDS s)"
    exit 1
}
step() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name ($SECONDS s)"
    "$@" || failed+=("$name")
}
can_import() { "$python" -c "import $1" 2>/dev/null; }

needs() {
    local missing=()
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || missing+=("Python >= 3.11 ($python)")
    for module in setuptools Cython numpy ml_dtypes safetensors tqdm; do can_import $module || missing+=("$module"); done
    command -v "${CC:-cc}" >/dev/null || missing+=("a C compiler (${CC:-cc})")
    [ ${#missing[@]} -eq 0 ] || { failed+=("missing: ${missing[*]}"); finish; }
}
build() {
    rm -rf "$built" # a module that is gone stays away
    "$python" setup.py -q build --build-lib "$built" >build/elsewhere.log 2>&1 || { tail -30 build/elsewhere.log; return 1; }
    ! grep -E 'forge_c/border|src_c.*warning:' build/elsewhere.log
}
c_api() {
    local out
    out=$(mktemp -d)
    ${CC:-cc} -std=gnu11 -O2 -fno-math-errno -ffp-contract=off -fopenmp -Isrc_c tools/check_c_api.c \
        $(find src_c -name '*.c') -lm -o "$out/check" && "$out/check" >"$out/log"
    local rc=$?
    tail -3 "$out/log"
    rm -rf "$out"
    return $rc
}
tests() { # [VARIABLE=VALUE...] FILE...
    (cd tests && PYTHONPATH=$built "$@")
}
suite() {
    local run=("$python" -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider --tb=short) gone file module
    if can_import xdist; then run+=(-n "$(nproc)" --dist worksteal); else notes+=("no pytest-xdist: the tests ran on one core"); fi
    for module in hypothesis threadpoolctl tokenizers jinja2; do
        can_import $module && continue
        gone=$(cd tests && grep -lE "^(import|from) $module\b" test_*.py || true)
        for file in $gone; do run+=("--ignore=tests/$file"); done
        notes+=("no $module, so not run: $(echo ${gone:-nothing})")
    done
    step suite tests "${run[@]}" "${selected[@]}"
    for isa in $(cd tests && PYTHONPATH=$built "$python" -c 'import forge_c; print(*forge_c.available_isas())'); do
        step "kernels on $isa" tests env FORGE_C_ISA="$isa" "${run[@]}" "${kernels[@]}"
    done
}

mkdir -p build
needs
step build build
[ ${#failed[@]} -eq 0 ] || finish
step "C kernels" c_api
if can_import pytest; then suite; else failed+=("suite: no pytest"); fi
step speeds env PYTHONPATH="$built" "$python" bench/threads_table.py
finish
