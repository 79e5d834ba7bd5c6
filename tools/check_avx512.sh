#!/usr/bin/env bash
# Runs the tests on the AVX-512 tables on a machine without AVX-512: tools/avx512_in_software stands in for the
# instructions, slowly. Nothing here says how fast the real ones are, nor that this compiler encodes them right.
#     tools/check_avx512.sh [pytest arguments; default: the suites of the kernels and models]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gcc -O2 -mavx2 -mfma -mf16c -Wno-psabi -Itools/avx512_in_software tools/avx512_in_software/check.c -lm -o "$work/check"
"$work/check"
${PYTHON:-python3} -m venv "$work/venv"
FORGE_C_SOFTWARE_AVX512=1 "$work/venv/bin/pip" install --quiet --no-cache-dir '.[test]'
cd tests
# Not here: what reads /proc/cpuinfo or the library's instructions, and what holds a clock to a speed.
FORGE_C_ISA=avx512_vnni_bf16 "$work/venv/bin/python" -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider \
    "${@:-.}" --deselect test_dispatch.py --deselect test_symbols.py --deselect test_threads.py --deselect test_roofline.py
