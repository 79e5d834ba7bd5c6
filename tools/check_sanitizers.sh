#!/usr/bin/env bash
#   check_sanitizers.sh address [TEST...]   tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, in
#                                           build/address beside .venv; arguments go to pytest, from tests/
#   check_sanitizers.sh thread              the C kernels, a program of their own, with ThreadSanitizer: clang, LLVM's
#                                           OpenMP, whose archer tells it what a barrier orders, as libgomp does not
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/${VENV:-.venv}/bin/python
kind=${1:?address or thread}
shift
built=$PWD/build/$kind

build() {
    echo "forge_c: building with sanitizers into build/$kind"
    mkdir -p build && rm -rf "$built" # a module that is gone stays away
    local flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    CC=gcc CFLAGS="$flags -fno-omit-frame-pointer" LDFLAGS=$flags FORGE_C_DEBUG=1 \
        "$python" setup.py -q build --build-lib "$built" >build/$kind.log 2>&1 || { tail -30 build/$kind.log; exit 1; }
}
case $kind in
address)
    build
    # Python is not built with it. Allocations that must fail return NULL, as they do without it.
    export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=0 UBSAN_OPTIONS=print_stacktrace=1
    rm -f "$built".report.*
    ASAN_OPTIONS+=:log_path=$built.report # a child may be meant to fail
    # Not for instrumented code: what it imports, what the heap weighs, who calls malloc, limits of address space.
    not=(test_symbols.py test_leaks.py test_process_state.py test_workspace.py
         test_chat_limits.py::test_no_template_takes_long_or_much_memory
         "test_fuzz.py::test_a_fuzzer_finds_nothing[mallocs]"
         test_kv_cache.py::test_too_large_for_this_computer_is_a_memory_error
         test_cache_file.py::test_attention_over_a_mapped_cache_needs_no_memory_of_its_size
         test_recurrent_state.py::test_of_what_was_read_only_the_ids_take_memory)
    cd tests
    rc=0
    # UBSan beside ASan writes to stderr all the same, and ends the process: pytest must not hold that back.
    PYTHONPATH=$built "$python" -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider --capture=sys \
        "${not[@]/#/--deselect=tests/}" "${@:-.}" || rc=$?
    unset LD_PRELOAD
    # What tests ask for in vain is warned of, and is no finding.
    if grep -hv 'WARNING: AddressSanitizer failed to allocate' "$built".report.* 2>/dev/null; then exit 1; fi
    exit $rc
    ;;
thread)
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
    archer=$(ls /usr/lib/llvm-*/lib/libarcher.so | tail -1)
    clang -std=gnu11 -O1 -g1 -fno-math-errno -ffp-contract=off -fsanitize=thread -fopenmp -Isrc_c tools/check_c_api.c \
        $(find src_c -name '*.c') -lm -o "$out/check"
    # setarch: newer kernels place libraries where ThreadSanitizer wants its own memory.
    OMP_TOOL_LIBRARIES=$archer TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 OMP_NUM_THREADS=4 \
        setarch -R "$out/check"
    ;;
*)
    echo "$kind: address or thread" >&2
    exit 2
    ;;
esac
