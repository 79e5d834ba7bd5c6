#!/usr/bin/env bash
# Runs the tests on the AVX-512 tables on a CPU that has no AVX-512 (AVX2 and gcc will do): their code built over
# tools/avx512_in_software, from a copy of the tree in a venv of its own, both thrown away.
# Arguments go to pytest, from tests/:   tools/check_avx512.sh test_linear.py -k bfloat16
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
soft=tools/avx512_in_software
${CC:-gcc} -std=gnu11 -O2 -ffp-contract=off -Wall -Wextra -mavx2 -mfma -mf16c -Wno-psabi -I$soft $soft/check.c -lm -o "$out/check"
"$out/check"

# A copy: without build isolation setuptools takes a library it finds in build/, whatever the switch was.
mkdir "$out/tree"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$out/tree"
cd "$out/tree"
python3 -m venv "$out/venv"
FORGE_C_SOFTWARE_AVX512=1 "$out/venv/bin/pip" install --quiet '.[test]'

# What asks about the CPU and its instructions instead of results.
real=(test_dispatch.py::test_an_isa_is_available_where_the_kernel_reports_what_it_needs
      test_symbols.py::test_negative_control_the_isa_files_do_hold_them
      test_symbols.py::test_each_vnni_file_uses_its_dot_product)
cd tests
FORGE_C_ISA=avx512_vnni_bf16 "$out/venv/bin/python" -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider \
    "${real[@]/#/--deselect=tests/}" "${@:-.}"
