#!/usr/bin/env bash
# Runs the tests on the AVX-512 and AVX-VNNI tables on a CPU that has neither (AVX2 and gcc will do): their code built
# over tools/avx512_in_software, in build/software_avx512 beside .venv.
# Arguments go to pytest, from tests/:   tools/check_avx512.sh test_linear.py -k bfloat16
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/${VENV:-.venv}/bin/python
mkdir -p build
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
soft=tools/avx512_in_software
${CC:-gcc} -std=gnu11 -O2 -ffp-contract=off -Wall -Wextra -mavx2 -mfma -mf16c -Wno-psabi -I$soft $soft/check.c -lm -o "$out/check"
"$out/check"
${CC:-gcc} -std=gnu11 -O2 -Wall -Wextra -mavx2 -mfma -mf16c -Wno-psabi -I$soft $soft/check_tiles.c -lm -o "$out/tiles"
"$out/tiles" 1000000

built=$PWD/build/software_avx512
echo "forge_c: building AVX-512 in software into build/software_avx512"
rm -rf "$built" # a module that is gone stays away
FORGE_C_SOFTWARE_AVX512=1 "$python" setup.py -q build --build-lib "$built" >build/software_avx512.log 2>&1 ||
    { tail -30 build/software_avx512.log; exit 1; }

# What asks about the CPU, its instructions and their speed instead of results.
real=(test_dispatch.py::test_an_isa_is_available_where_the_kernel_reports_what_it_needs
      test_symbols.py::test_negative_control_the_isa_files_do_hold_them
      test_symbols.py::test_bfloat16_and_bytes_are_multiplied_by_the_instruction_for_it
      test_symbols.py::test_the_isa_files_hold_only_what_their_cpus_have
      test_roofline.py::test_rates_are_positive_and_grow_with_the_threads)
cd tests
PYTHONPATH=$built "$python" -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider \
    --every-isa "${real[@]/#/--deselect=tests/}" "${@:-.}"
