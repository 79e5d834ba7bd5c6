#!/usr/bin/env bash
# Runs the Python tests on aarch64 under qemu-user: Debian's arm64 Python unpacked into build/aarch64, wheels of what the
# tests need, the library cross-compiled. No chroot, no binfmt, nothing installed; some twenty times slower than a machine.
# Needs Debian's debootstrap, qemu-user-static and gcc-aarch64-linux-gnu, a Debian mirror and PyPI.
# Arguments go to pytest, from tests/:   tools/check_aarch64_suite.sh test_softmax.py
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD
out=$tree/build/aarch64
root=$out/root
mirror=${MIRROR:-http://deb.debian.org/debian}
python=$out/python
mkdir -p "$out"

if [ ! -x "$python" ]; then
    fakeroot=$([ "$(id -u)" = 0 ] || echo fakeroot) # it only downloads; owners do not matter
    rm -rf "$root"
    $fakeroot debootstrap --arch=arm64 --foreign --variant=minbase \
        --include=python3,python3-dev,libpython3-stdlib,libgomp1 bookworm "$root" "$mirror" >"$out/debootstrap.log"
    for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    python3 -m pip install --quiet --target "$out/site" --python-version 3.11 --only-binary=:all: \
        --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 \
        setuptools cython numpy ml_dtypes safetensors tqdm pytest hypothesis threadpoolctl tokenizers jinja2
    # Tests start sys.executable: a script of this machine, which starts the emulator.
    printf 'import sys\nsys.executable = "%s"\n' "$python" >"$out/site/sitecustomize.py"
    printf '#!/bin/sh\nexec qemu-aarch64-static -L %s %s/usr/bin/python3.11 "$@"\n' "$root" "$root" >"$python"
    mkdir -p "$out/bin"
    ln -s "$(command -v aarch64-linux-gnu-objdump)" "$out/bin/objdump" # for the tests of symbols
    chmod +x "$python"
fi

# The emulated Python starts this machine's cross compiler, at full speed. Its own headers come before this machine's.
include=$root/usr/include
PYTHONPATH=$out/site CC=aarch64-linux-gnu-gcc CFLAGS="-I$include/python3.11 -idirafter $include" \
    "$python" setup.py -q build --build-lib "$out/lib" 2>&1 | { grep -E 'warning:|error|compiled' || true; }
cd tests
# qemu's CPU has SVE, with which NumPy's OpenBLAS makes NaN of x.T @ x in float32.
export OPENBLAS_CORETYPE=ARMV8
export EMULATOR="qemu-aarch64-static -L $root" # of programs that tests compile
CC=aarch64-linux-gnu-gcc PATH=$out/bin:$PATH PYTHONPATH=$out/lib:$out/site PYTHONDONTWRITEBYTECODE=1 \
    "$python" -m pytest -c ../pyproject.toml --rootdir .. -p no:cacheprovider "${@:-.}"
