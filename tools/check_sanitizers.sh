#!/usr/bin/env bash
#   check_sanitizers.sh address [TEST...]   tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, in
#                                           build/address beside .venv; arguments go to pytest, from tests/
#   check_sanitizers.sh thread              the C kernels, a program of their own, with ThreadSanitizer: clang, LLVM's
#                                           OpenMP, whose archer tells it what a barrier orders, as libgomp does not
#   check_sanitizers.sh thread TEST...      tests instead, in a Python that begins with ThreadSanitizer, on a build in
#                                           build/thread; without pytest-xdist, whose workers it ends
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/${VENV:-.venv}/bin/python
kind=${1:?address or thread}
shift
built=$PWD/build/$kind

build() { # compiler, flags
    echo "forge_c: building with sanitizers into build/$kind"
    mkdir -p build && rm -rf "$built" # a module that is gone stays away
    CC=$1 LDSHARED="$1 -shared" CFLAGS="$2 -fno-omit-frame-pointer" LDFLAGS=$2 FORGE_C_DEBUG=1 \
        "$python" setup.py -q build --build-lib "$built" >build/$kind.log 2>&1 || { tail -30 build/$kind.log; exit 1; }
}
case $kind in
address)
    build gcc "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
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
    export OMP_TOOL_LIBRARIES=$(ls /usr/lib/llvm-*/lib/libarcher.so | tail -1) OMP_NUM_THREADS=4
    export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1
    # setarch: newer kernels place libraries where ThreadSanitizer wants its own memory.
    if [ $# -eq 0 ]; then
        clang -std=gnu11 -O1 -g1 -fno-math-errno -ffp-contract=off -fsanitize=thread -fopenmp -Isrc_c \
            tools/check_c_api.c $(find src_c -name '*.c') -lm -o "$out/check"
        setarch -R "$out/check"
        exit
    fi
    build clang -fsanitize=thread
    # Not preloaded, which ends any program: part of the one that runs.
    read -r include libs < <("$python" -c 'if True:
        from sysconfig import get_config_var as of
        print(of("INCLUDEPY"), "-L" + of("LIBDIR"), "-Wl,-rpath," + of("LIBDIR"), "-lpython" + of("LDVERSION"))')
    echo '#include <Python.h>
int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }' >"$out/main.c"
    clang -fsanitize=thread "-I$include" "$out/main.c" $libs -Wl,--export-dynamic -o "$out/python"
    rm -f "$built".report.*
    TSAN_OPTIONS+=:halt_on_error=0:exitcode=0:allocator_may_return_null=1:report_signal_unsafe=0:log_path=$built.report
    # What is linked with a program in C that lacks it, reads what must not be read, counts threads, or what mallocs do.
    not=(test_causal_conv1d.py::test_a_weight_in_panels test_ssd_scan.py::test_states_with_p_last
         test_routed_models.py::test_a_layer_that_nobody_goes_through_is_not_read
         test_threads.py::test_these_sizes_are_split test_workspace.py
         test_kv_cache.py::test_too_large_for_this_computer_is_a_memory_error)
    cd tests
    rc=0
    PYTHONPATH=$built:$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))') setarch -R "$out/python" \
        -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider "${not[@]/#/--deselect=tests/}" "$@" || rc=$?
    if grep -l 'data race' "$built".report.* 2>/dev/null; then exit 1; fi
    exit $rc
    ;;
*)
    echo "$kind: address or thread" >&2
    exit 2
    ;;
esac
