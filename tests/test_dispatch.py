"""Which kernels run: the list of ISAs, forcing one, and the proof that the force took."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from child import run_script

import forge_c as fc
from forge_c import functional

CPUINFO = Path("/proc/cpuinfo").read_text()
BEST_FIRST = ["avx512_amx", "avx512_vnni_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "base"]
if "GenuineIntel" in CPUINFO:  # its products of bfloat16 pairs are no faster than float32 ones
    BEST_FIRST[1:3] = reversed(BEST_FIRST[1:3])
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDS = {
    "base": set(),
    "avx2": AVX2,
    "avx_vnni": AVX2 | {"avx_vnni"},
    "avx512": AVX512,
    "avx512_vnni": AVX512 | {"avx512_vnni"},
    "avx512_vnni_bf16": AVX512 | {"avx512_vnni", "avx512_bf16"},
}
NEEDS["avx512_amx"] = NEEDS["avx512_vnni_bf16"] | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.fixture(autouse=True)
def same_isa_afterwards() -> Iterator[None]:
    before = fc.isa()
    yield
    fc.use_isa(before)


def fingerprint() -> str:
    """A digest of results whose last bits depend on the ISA: fused or not, the width of sums, bfloat16 products; and
    of how many products of int8 and of nibbles its kernels make beside one of float32, as VNNI changes no bit."""
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((9, 301), np.float32), rng.standard_normal((301, 77), np.float32)
    parts = fc.linear(x, w), fc.rms_norm(x), fc.softmax(x), fc.linear(x, fc.pack(w, "bfloat16"))
    at_once = [functional._peak_ops(what, 1) / functional._peak_ops("fp32", 1) for what in ("int8", "int4")]
    return hashlib.sha256(b"".join([*(p.tobytes() for p in parts), repr(at_once).encode()])).hexdigest()


def fingerprints() -> dict[str, str]:
    prints = {}
    for name in fc.available_isas():
        fc.use_isa(name)
        prints[name] = fingerprint()
    return prints


def test_best_first_and_base_always():
    available = fc.available_isas()
    assert available == tuple(name for name in BEST_FIRST if name in available)
    assert available[-1] == "base" and fc.isa() in available


@pytest.mark.parametrize("name", BEST_FIRST)
def test_an_isa_is_available_where_the_kernel_reports_what_it_needs(name):
    flags: set[str] = set()
    if platform.machine() == "x86_64":
        flags = set(next(line for line in CPUINFO.splitlines() if line.startswith("flags")).split(":")[1].split())
    assert (name in fc.available_isas()) == (NEEDS[name] <= flags)


def test_use_isa_takes_effect_and_back():
    best = fc.available_isas()[0]
    for name in (*fc.available_isas(), best):
        assert fc.use_isa(name) is None
        assert fc.isa() == name


@pytest.mark.parametrize("name", ["", "AVX2", "avx2 ", "sse9", "avx1024", "x" * 1000, "\N{GREEK SMALL LETTER ALPHA}"])
def test_a_name_that_is_none_changes_nothing(name):
    before = fc.isa(), fingerprint()
    with pytest.raises(ValueError) as caught:
        fc.use_isa(name)
    assert str(caught.value) == f"use_isa: {name!r} does not run here, expected one of {', '.join(fc.available_isas())}"
    assert (fc.isa(), fingerprint()) == before


def test_isas_differ_in_their_last_bits_and_in_no_more():
    """Every pair of ISAs has other prints, so they tell which one ran; the values agree."""
    prints = fingerprints()
    assert len(set(prints.values())) == len(prints)
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((9, 301)), rng.standard_normal((301, 77))
    for name in fc.available_isas():
        fc.use_isa(name)
        got = fc.linear(x.astype(np.float32), w.astype(np.float32))
        np.testing.assert_allclose(got, x @ w, atol=303 * 2.0**-24 * (np.abs(x) @ np.abs(w)).max())


def test_a_fused_product_is_what_parts_base_from_the_others():
    """(1 + e)(1 - e) - 1 = -e^2 with one rounding, 0 with two."""
    e = np.float32(2.0**-13)
    x = np.array([[-1, 1 + e]], np.float32)
    w = np.array([[1], [1 - e]], np.float32)
    for name in fc.available_isas():
        fc.use_isa(name)
        fused = fc.linear(x, fc.pack(w))[0, 0]
        assert fused == (0 if name == "base" and platform.machine() == "x86_64" else -(2.0**-26))


CHILD = """
import forge_c as fc
from test_dispatch import fingerprint
print(fc.isa(), fc.show_config()["isa"], fingerprint())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", fc.available_isas())
def test_the_environment_forces_an_isa(name):
    prints = fingerprints()
    last = run_script(CHILD, FORGE_C_ISA=name).splitlines()[-1].split()
    assert last == [name, name, prints[name]]


def test_an_empty_environment_variable_is_none():
    best = fc.available_isas()[0]
    assert run_script(CHILD, FORGE_C_ISA="").splitlines()[-1].split() == [best, best, fingerprints()[best]]


@pytest.mark.parametrize("name", ["nope", "AVX2", "base "])
def test_a_wrong_name_in_the_environment_fails_the_import(name):
    out = run_script("import forge_c.functional", expect=1, FORGE_C_ISA=name)
    expected = f"ValueError: use_isa: {name!r} does not run here, expected one of {', '.join(fc.available_isas())}"
    assert out.splitlines()[-1] == expected


SMALL_SIGNAL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
import forge_c as fc
print(*fc.available_isas())
"""
TILES_ASKED_FOR = """
import ctypes, forge_c as fc
def asked() -> bool:
    mask = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0
    return bool(mask.value >> 18 & 1)
before = fc.isa(), asked()
fc.available_isas()
print(*before, asked())
"""
amx = pytest.mark.skipif("avx512_amx" not in fc.available_isas() or "amx_tile" not in CPUINFO,
                         reason="this CPU has no AMX, or the system refuses it")


@amx
def test_where_the_system_refuses_tiles_the_next_table_runs():
    """As Linux does where some thread's signal stack is too small for them."""
    assert run_script(SMALL_SIGNAL_STACK, FORGE_C_ISA="").split() == list(fc.available_isas()[1:])


@amx
def test_tiles_are_asked_for_when_they_are_wanted():
    """Of ARCH_GET_XCOMP_PERM: at load, unless another ISA is named, and then by whoever asks what there is."""
    assert run_script(TILES_ASKED_FOR, FORGE_C_ISA="").split() == ["avx512_amx", "True", "True"]
    assert run_script(TILES_ASKED_FOR, FORGE_C_ISA="avx2").split() == ["avx2", "False", "True"]


def test_importing_the_package_alone_runs_no_kernel_code():
    source = "import forge_c, sys; print('forge_c.functional' in sys.modules)"
    assert run_script(source, FORGE_C_ISA="nope") == "False\n"


def test_drivers_read_the_table_once():
    """`k = fc_k` at an op's start, `k->name` from there on: the table may be changed at any time."""
    source = Path(__file__).parents[1] / "src_c"
    drivers = {p.name: p.read_text() for folder in ("ops", "state", "decoder") for p in (source / folder).rglob("*.c")}
    assert len(drivers) > 10
    assert {name for name, text in drivers.items() if re.search(r"\bfc_k(->|\)->)", text)} == set()
