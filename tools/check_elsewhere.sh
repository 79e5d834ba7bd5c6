#!/usr/bin/env bash
# On any x86-64 or aarch64 Linux, offline: builds from the tree, checks the C kernels, measures the machine beside whatever
# else is installed and writes its page, runs the suite on all cores and the kernel suites on every ISA there is. The last
# line says pass, or what failed. Takes what PYTHON (default: python3) can import: without pytest-xdist the suite takes one
# core, without torch, ONNX Runtime and llama.cpp the page has fewer columns, without matplotlib no pictures (bench/page.py
# --draw makes them of the figures elsewhere); what the package itself needs must be there.
#   --page-only, --tests-only     one half of it
#   --limit SECONDS               for all of it: the page takes what the build leaves, or with tests half of that; tests
#                                 that would take longer are ended, and that is a failure
#   --out DIR                     where to write benchmarks/<machine>.md and .json (default: docs, in the tree)
#   --llama-bench PATH            llama.cpp's (default: LLAMA_BENCH, or from the PATH)
# FORGE_C_COMMIT in the environment is what the page calls this version where there is no git checkout.
# Other arguments are test files to run instead of all, and on every ISA. 16 cores take eight minutes for the tests; on a
# machine that is lent for a quarter of an hour: --page-only --limit 420, then --tests-only --limit 420.
set -uo pipefail
python=${PYTHON:-python3}
[[ $python == /* || $python != */* ]] || python=$PWD/$python # the tests run in another folder
page=yes tests=yes limit=0 out= files=()
while [ $# -gt 0 ]; do
    case $1 in
    --page-only) tests= ;;
    --tests-only) page= ;;
    --limit) limit=${2:?} && shift ;;
    --out) out=$(realpath -m "${2:?}") && shift ;;
    --llama-bench) LLAMA_BENCH=$(realpath "${2:?}") && export LLAMA_BENCH && shift ;;
    -*) echo "check_elsewhere: $1: no such option" >&2 && exit 2 ;;
    *) files+=("$1") ;;
    esac
    shift
done
cd "$(dirname "$0")/.."
out=${out:-$PWD/docs}
built=$PWD/build/elsewhere
failed=()
notes=()
kernels=(test_rms_norm.py test_layer_norm.py test_softmax.py test_activations.py test_elementary.py test_rope.py
         test_embedding.py test_linear.py test_quantized.py test_attention.py test_attention_cache.py test_merge_attention.py
         test_kv_cache.py test_causal_conv1d.py test_selective_scan.py test_ssd_scan.py test_gated_delta.py test_s4d.py
         test_rg_lru.py test_mixture_of_depths.py)
[ ${#files[@]} -eq 0 ] || kernels=("${files[@]}")
selected=("${files[@]:-.}")

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
left() { # seconds until the limit, 5 of them to end in; a day if there is none
    if [ "$limit" -eq 0 ]; then echo 86400; else echo $((limit - SECONDS > 6 ? limit - SECONDS - 5 : 1)); fi
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
    local folder
    folder=$(mktemp -d)
    find src_c tools/check_c_api.c -name '*.c' | timeout -k 5 "$(left)" xargs -P "$(nproc)" -I{} sh -c \
        'exec $0 -std=gnu11 -O2 -fno-math-errno -ffp-contract=off -fopenmp -Isrc_c -c "$2" -o "$1/$(echo "$2" | tr / _).o"' \
        "${CC:-cc}" "$folder" {} &&
        ${CC:-cc} -fopenmp "$folder"/*.o -lm -o "$folder/check" && timeout -k 5 "$(left)" "$folder/check" >"$folder/log"
    local rc=$?
    tail -3 "$folder/log"
    rm -rf "$folder"
    return $rc
}
page() { # its last part is written when the one before is done, so that an end in between loses one part
    local seconds=300
    if [ "$limit" -gt 0 ]; then seconds=$(($(left) / (${tests:+1} + 1))); fi
    echo "page: $seconds s"
    PYTHONPATH=$built timeout -k 5 $((seconds + 30 < $(left) ? seconds + 30 : $(left))) \
        "$python" bench/page.py --seconds $((seconds > 20 ? seconds - 10 : seconds)) --out "$out"
}
run_tests() { # [VARIABLE=VALUE...] COMMAND...
    (cd tests && PYTHONPATH=$built timeout -k 5 "$(left)" "$@")
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
    step suite run_tests "${run[@]}" "${selected[@]}"
    for isa in $(cd tests && PYTHONPATH=$built "$python" -c 'import forge_c; print(*forge_c.available_isas())'); do
        step "kernels on $isa" run_tests env FORGE_C_ISA="$isa" "${run[@]}" "${kernels[@]}"
    done
}

mkdir -p build
needs
step build build
[ ${#failed[@]} -eq 0 ] || finish
[ -z "$tests" ] || step "C kernels" c_api
[ -z "$page" ] || step page page
if [ -n "$tests" ]; then
    if can_import pytest; then suite; else failed+=("suite: no pytest"); fi
fi
finish
