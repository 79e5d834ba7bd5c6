#!/usr/bin/env bash
# Cross-compiles src_c for aarch64 and checks every kernel under emulation.
# Needs Debian's gcc-aarch64-linux-gnu and qemu-user.   CC=gcc RUN= tools/check_aarch64.sh checks the host instead.
set -euo pipefail
cd "$(dirname "$0")/.."
CC=${CC-aarch64-linux-gnu-gcc}
RUN=${RUN-qemu-aarch64}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
$CC -std=gnu11 -O2 -fno-math-errno -ffp-contract=off -Wall -Wextra -Wconversion -fopenmp -static -Isrc_c \
    tools/check_c_api.c $(find src_c -name '*.c') -lm -o "$out/check"
$RUN "$out/check"
