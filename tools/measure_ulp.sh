#!/usr/bin/env bash
# Builds tools/measure_ulp.c with the library's flags for each size of vectors and runs it: five minutes each on one
# core, less for the functions that its arguments name. AVX-512 that the CPU lacks is measured in software.
set -euo pipefail
names=("$@")
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
run() {
    ${CC:-gcc} -std=gnu11 -O2 -fno-math-errno -ffp-contract=off -Wall -Wextra -Wconversion -fopenmp -Isrc_c "$@" \
        tools/measure_ulp.c -lm -o "$out/measure"
    "$out/measure" "${names[@]}"
}
has() { grep -qw "$1" /proc/cpuinfo; }
run -DFC_BYTES=16
if has avx2; then
    run -DFC_BYTES=32
    if has avx512bw; then run -DFC_BYTES=64
    else run -DFC_BYTES=64 -DFC_SOFTWARE_AVX512 -Wno-psabi -Itools/avx512_in_software; fi
fi
