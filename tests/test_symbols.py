"""What libforge_c.so and the extension module ask for, offer and contain, read with binutils."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from c_api import constants, structs
from c_api import functions as declared
from child import run_script

import forge_c
from forge_c import functional

LIBRARY, MODULE = str(Path(forge_c.get_library_dir(), "libforge_c.so")), functional.__file__
HEADER = Path(forge_c.get_include(), "forge.h")
both = pytest.mark.parametrize("file", [LIBRARY, MODULE], ids=lambda path: Path(path).name)
SOURCES = Path(__file__).parents[1]
ISA_FILES = ("avx2.c", "avx_vnni.c", "avx512.c", "avx512_vnni.c", "avx512_vnni_bf16.c", "avx512_amx.c")

ENDS_OR_PRINTS = re.compile(
    r"_*(abort|exit|_exit|_Exit|quick_exit|at_quick_exit|raise|kill|assert\w*|assert_fail\w*"
    r"|v?f?printf(_chk)?|v?fprintf|v?dprintf|puts|fputs|putchar|fputc|putc|fwrite|write|perror|err|warn"
    r"|longjmp(_chk)?|siglongjmp|system|popen|exec\w*|fork)")
# Calls that compilers add, Ubuntu's gcc without being asked (-fstack-protector, _FORTIFY_SOURCE): they end the process
# where it has overwritten, or is about to overwrite, memory that is not its own. Whether a build is hardened is for
# those who build it; our text names none of them.
ADDED_BY_HARDENING = re.compile(r"__stack_chk_fail|__(mem|str|stp)\w+_chk|__(v?sn?|as)printf_chk|__(chk|fdelt)_\w+")
CHANGES_THE_PROCESS = re.compile(
    r"fesetround|fesetenv|feenableexcept|fedisableexcept|feholdexcept|setenv|putenv|unsetenv|clearenv|signal|sigaction"
    r"|sigprocmask|pthread_sigmask|setrlimit|s?rand|srandom|omp_set_\w+|set_fast_math|setlocale|chdir|umask|mlockall"
    r"|sched_setaffinity|pthread_setaffinity_np|setpriority|nice")


def tool(file: str, *command: str) -> str:
    return subprocess.run([*command, file], capture_output=True, text=True, check=True).stdout


@cache
def imported(file: str) -> frozenset[str]:
    """The undefined dynamic symbols, without their versions."""
    lines = tool(file, "nm", "-D", "--undefined-only").splitlines()
    return frozenset(line.split()[-1].split("@")[0] for line in lines)


@cache
def functions(file: str) -> dict[int, tuple[str, str]]:
    """Address -> (source file, name) of every function: local symbols follow the FILE symbol of their source."""
    found, source = {}, ""
    for line in tool(file, "readelf", "-sW").split(".symtab", 1)[1].splitlines():
        fields = line.split()
        if len(fields) < 8:
            source = "" if fields[3:4] == ["FILE"] else source
        elif fields[3] == "FILE":
            source = fields[7]
        elif fields[3] == "FUNC" and fields[6] != "UND":
            found[int(fields[1], 16)] = (source, fields[7])
    return found


@cache
def wide_instructions(file: str) -> dict[str, dict[str, list[str]]]:
    """Source file -> function -> instructions that need more than the x86-64 baseline."""
    wide = re.compile(r"^\s*[0-9a-f]+:\s+(?P<text>(v(?!er[rw]|m)\w+|\{vex\} .*|.*%[yz]mm\d+|.*%k[0-7]|andn|bextr|bzhi"
                      r"|tile\w+|tdp\w+|(ld|st)tilecfg|mulx|pdep|pext|rorx|sarx|shlx|shrx|blsi|blsr|blsmsk|tzcnt|lzcnt|popcnt|movbe|crc32)\b.*)")
    result: dict[str, dict[str, list[str]]] = {source: {} for source, _ in functions(file).values()}
    held: list[str] = []
    for line in tool(file, "objdump", "-d", "--no-show-raw-insn", "--section=.text").splitlines():
        head = re.match(r"^([0-9a-f]+) <(.*)>:$", line)
        if head:
            source, name = functions(file).get(int(head[1], 16), ("", head[2]))
            held = result.setdefault(source, {}).setdefault(name, [])
        elif match := wide.match(line):
            held.append(match["text"])
    return result


@both
def test_nothing_ends_the_process_or_prints(file):
    assert "free" in imported(file) or "PyMem_Free" in imported(file)
    assert {name for name in imported(file) if ENDS_OR_PRINTS.fullmatch(name)} == set()


def test_our_text_names_none_of_what_a_hardening_compiler_adds():
    files = [path for part in ("src_c", "forge_c") for path in Path(SOURCES, part).rglob("*")
             if path.suffix in {".c", ".h", ".pyx", ".pxi", ".pxd"} and path.name != "functional.c"]
    assert len(files) > 30
    named = {(path.name, word) for path in files for word in re.findall(r"\b__\w+", path.read_text())}
    assert {(file, word) for file, word in named if ADDED_BY_HARDENING.fullmatch(word)} == set()


@both
def test_nothing_changes_the_state_of_the_process(file):
    assert {name for name in imported(file) if CHANGES_THE_PROCESS.fullmatch(name)} == set()
    assert not any("fast_math" in name for _, name in functions(file).values())


@pytest.mark.parametrize(("pattern", "names"), [
    (ENDS_OR_PRINTS, "abort exit _exit __assert_fail printf __printf_chk __fprintf_chk puts fwrite longjmp raise"),
    (ADDED_BY_HARDENING, "__stack_chk_fail __memcpy_chk __memset_chk __strcpy_chk __snprintf_chk __chk_fail"),
    (CHANGES_THE_PROCESS, "fesetround setenv sigaction omp_set_num_threads omp_set_dynamic srand set_fast_math"),
])
def test_the_lists_know_what_they_are_for(pattern, names):
    assert all(pattern.fullmatch(name) for name in names.split())
    innocent = "omp_get_max_threads expf PyErr_Format memset snprintf"
    assert not any(pattern.fullmatch(name) for name in innocent.split())


def offered(file: str) -> list[str]:
    return [line.split()[-1] for line in tool(file, "nm", "-D", "--defined-only").splitlines()]


def test_the_library_offers_what_the_header_declares():
    assert len(offered(LIBRARY)) > 20
    assert offered(LIBRARY) == sorted(declared(HEADER.read_text()))


@pytest.mark.parametrize("part", [declared, structs, constants])
def test_the_mirror_for_cython_says_what_the_header_says(part):
    """Cython takes the mirror's word for types, and what it lacks cannot be reached."""
    header, mirror = part(HEADER.read_text()), part(Path(HEADER.parents[1], "_c.pxd").read_text())
    assert len(header) > 5
    assert mirror == header


def test_the_module_offers_itself():
    assert offered(MODULE) == ["PyInit_functional"]


def test_the_module_has_no_kernels_of_its_own():
    """One state for Python, C and Cython: whatever the module calls comes from the library."""
    used = {name for name in imported(MODULE) if name.startswith("fc_")}
    assert used >= {"fc_linear", "fc_use_isa", "fc_set_num_threads"} and used <= set(offered(LIBRARY))
    assert not any(name.startswith("fc_") for _, name in functions(MODULE).values())


def test_the_library_calls_itself_directly():
    """Through the PLT another library's function of the same name could take a call."""
    assert set(re.findall(r"<(fc_\w+)@plt>", tool(LIBRARY, "objdump", "-d", "--no-show-raw-insn"))) == set()


@both
def test_each_library_needed_is_a_system_one_or_ours(file):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool(file, "readelf", "-dW"))
    allowed = r"lib(c|m|pthread|gomp|omp|iomp5|gcc_s|python3.*)\.so.*|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == ["libforge_c.so"] * (file == MODULE)
    openmp = file == LIBRARY and functional._openmp() != "none"
    assert sum(bool(re.match(r"lib(g|i)?omp", name)) for name in needed) == openmp


def test_the_library_beside_the_module_is_the_one_that_is_loaded():
    """Wherever the package lies, and under the name that `-lforge_c` finds."""
    run_path = re.findall(r"\(RUNPATH\).*\[(.*)\]", tool(MODULE, "readelf", "-dW"))
    assert "$ORIGIN" in run_path[0].split(":")
    assert "(SONAME)             Library soname: [libforge_c.so]" in tool(LIBRARY, "readelf", "-dW")
    loaded = set(re.findall(r"/.*libforge_c.*", Path("/proc/self/maps").read_text()))
    assert loaded == {str(Path(LIBRARY).resolve())}


@both
def test_no_executable_stack_and_no_text_relocations(file):
    stack = next(line for line in tool(file, "readelf", "-lW").splitlines() if "GNU_STACK" in line)
    assert "E" not in stack.split()[6]
    assert "TEXTREL" not in tool(file, "readelf", "-dW")


def on_x86() -> bool:
    return "X86-64" in tool(LIBRARY, "readelf", "-hW")


@both
def test_only_the_isa_files_hold_instructions_beyond_the_baseline(file):
    """A vector instruction anywhere else would be a crash on an older CPU, before or past the dispatch."""
    outside = {(source, name): found[:3] for source, named in wide_instructions(file).items() if source not in ISA_FILES
               for name, found in named.items() if found}
    assert outside == {} or not on_x86()


@pytest.mark.parametrize("source", ISA_FILES)
def test_negative_control_the_isa_files_do_hold_them(source):
    """The scan finds what it looks for, where it must be, and finds every file."""
    register = "%zmm" if source.startswith("avx512") else "%ymm"
    assert {"dispatch.c", "threads.c", "base.c", "linear.c", "attention.c"} <= set(wide_instructions(LIBRARY))
    assert "functional.c" in wide_instructions(MODULE)
    in_gemm = wide_instructions(LIBRARY).get(source, {}).get("gemm_f32_tile_6", [])
    assert any(text.startswith("vfmadd") and register in text for text in in_gemm) or not on_x86()


@pytest.mark.parametrize(("instruction", "sources"), [
    ("vdpbf16ps", {"avx512_vnni_bf16.c"}), ("tdpbf16ps", {"avx512_amx.c"}), ("tdpbsud", {"avx512_amx.c"}),
    ("tdpbssd", {"avx512_amx.c"}), ("tdpbusd", {"avx512_amx.c"}),
    ("vpdpbusd", {"avx_vnni.c", "avx512_vnni.c", "avx512_vnni_bf16.c", "avx512_amx.c"})])
def test_bfloat16_and_bytes_are_multiplied_by_the_instruction_for_it(instruction, sources):
    """And by one alone: two instructions would add in two orders, and a row would not have the bits of many."""
    found = wide_instructions(LIBRARY)
    using = {source for source in ISA_FILES for texts in found.get(source, {}).values()
             if any(text.removeprefix("{vex} ").startswith(instruction) for text in texts)}
    assert using == sources or not on_x86()


def test_the_isa_files_hold_only_what_their_cpus_have():
    """AVX-VNNI is another encoding of the instructions of AVX-512, which has registers 16 to 31 and masks."""
    for source in ("avx2.c", "avx_vnni.c"):
        wide = [text for held in wide_instructions(LIBRARY).get(source, {}).values() for text in held]
        assert wide or not on_x86()
        assert not [text for text in wide if re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]", text)]
        dots = [text for text in wide if "vpdp" in text]
        assert all(text.startswith("{vex} ") for text in dots) and bool(dots) == (source == "avx_vnni.c" and on_x86())


@both
def test_what_runs_at_load_is_baseline_code(file):
    """Constructors run before any dispatch: none of them may come from an ISA file."""
    section = re.search(r"\.init_array\s+\S+\s+([0-9a-f]+)\s+\S+\s+([0-9a-f]+)", tool(file, "readelf", "-SW"))
    assert section
    start, size = int(section[1], 16), int(section[2], 16)
    relative = r"^([0-9a-f]+)\s+[0-9a-f]+ R_\w+_RELATIVE\s+([0-9a-f]+)"
    relocations = re.findall(relative, tool(file, "readelf", "-rW"), re.M)
    run = [functions(file)[int(to, 16)] for at, to in relocations if start <= int(at, 16) < start + size]
    assert (("dispatch.c", "choose_best") in run) == (file == LIBRARY)
    assert [source for source, _ in run if source in ISA_FILES] == []


def test_only_dispatch_names_the_tables_of_the_isas():
    """Kernels are reached through the table in use; every one of them is local to its file."""
    symbols = [line.split() for line in tool(LIBRARY, "nm").splitlines()]
    tables = [name for *_, kind, name in symbols if name.startswith("fc_kernels_")]
    assert sorted(tables) == sorted(["fc_kernels_base", *(f"fc_kernels_{Path(name).stem}" for name in ISA_FILES)]) \
        or not on_x86()
    assert {name for *_, kind, name in symbols if kind == "T"} == set(offered(LIBRARY))


def test_what_functional_offers_checks_its_arguments():
    """KVPages, LayeredModel and what else trusts the package above it are no part of the offer."""
    trusting = {"KVPages", "LayeredModel", "StateTable", "AttentionPart", "MLPPart", "CalledPart", "pack_columns",
                "search_scales", "fold_attention", "fold_parts"}
    assert not trusting & set(functional.__all__) and all(hasattr(functional, name) for name in trusting)
    for call in (lambda: functional.KVPages(None, 1, 4, 4, False), lambda: functional.pack_columns(None, None),
                 lambda: functional.search_scales(None, None, None, 32, 1, True, 0, 15),
                 lambda: functional.KVPages("float32", 1, 4, 4, False).with_table(None),
                 lambda: functional.fold_attention(None, None, None, None, None),
                 lambda: functional.fold_parts(None, None),
                 lambda: functional.LayeredModel(None, [], None, None), lambda: functional._read_bytes(None),
                 lambda: functional.StateTable(None), lambda: functional.AttentionState(None),
                 lambda: functional.AttentionPart(None, None, heads=1, kv_heads=1, head_dim=1),
                 lambda: functional._copy_bytes(None, None)):
        with pytest.raises(TypeError, match="must not be None|expected"):
            call()


SCRATCH_BEYOND_MEMORY = """
import ctypes
import re
from pathlib import Path

import forge_c
from c_api import structs

header = Path(forge_c.get_include(), "forge.h").read_text()
sizes = {"size_t": ctypes.c_size_t, "ptrdiff_t": ctypes.c_ssize_t, "float": ctypes.c_float}


def c_type(kind):
    plain = ctypes.c_void_p if "*" in kind else sizes.get(kind.split()[0], ctypes.c_int)
    length = re.search(r"\\[(\\d+)\\]", kind)
    return plain * int(length[1]) if length else plain


class Args(ctypes.Structure):
    _fields_ = [(name, c_type(kind)) for kind, name in structs(header)["fc_attention_args"]]


one = (ctypes.c_float * 1)(1.0)
at = ctypes.addressof(one)
library = ctypes.CDLL(str(Path(forge_c.get_library_dir(), "libforge_c.so")))
for heads, v_dim in ((2**64 // 1116 + 1, 0), (2**54, 0), (1, 2**60), (1, 2**62)):
    for kv_len in (3, 600):
        args = Args(size=ctypes.sizeof(Args), q=at, k=at, v=at, out=at, batch=1, q_len=1, kv_len=kv_len,
                    heads=heads, kv_heads=1, head_dim=1, v_dim=v_dim, scale=1.0)
        print(library.fc_attention(ctypes.byref(args)), end=" ")
"""


def test_scratch_that_no_memory_holds_is_no_memory():
    """Sizes whose product passes 2^63: FC_NO_MEMORY, not a block of what is left of the product."""
    assert run_script(SCRATCH_BEYOND_MEMORY) == "1 " * 8


def test_a_page_that_no_memory_holds_has_the_largest_size():
    for sizes in ((2**40, 2**13, 2**13), (1, 2**54, 16), (1, 2**63 - 1, 2**63 - 1), (2**62, 1, 1)):
        for dtype in ("float32", "bfloat16", "int8"):
            assert functional.KVPages(dtype, *sizes, False).page_nbytes > 2**62
    assert functional.KVPages("float32", 1, 2**54, 16, False).page_nbytes > 2**62
