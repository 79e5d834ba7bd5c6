"""Builds libforge_c.so from every C file of src_c, and the extension module over it. Options live in pyproject.toml."""
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARY = "forge_c.libforge_c"
# NDEBUG here too: CFLAGS in the environment take Python's away, and what Cython writes would assert.
FLAGS = ["-std=gnu11", "-O2", "-DNDEBUG", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-Wall",
         "-Wextra"]
# Debug information would be ten times the rest of the package, and half of the time that gcc takes.
FLAGS += ["-g" + os.environ.get("FORGE_C_DEBUG", "0")]  # 1: lines, 2: variables too
# For tools/check_avx512.sh alone: the AVX-512 tables as AVX2 code, many times slower.
if os.environ.get("FORGE_C_SOFTWARE_AVX512") == "1":
    FLAGS += ["-DFC_SOFTWARE_AVX512", "-Itools/avx512_in_software", "-Wno-psabi"]


def is_fresh(obj: Path) -> bool:
    """Whether an object is younger than all it was made of, which gcc and clang write beside it (-MMD)."""
    made_of = obj.with_suffix(".d")
    if not obj.exists() or not made_of.exists():
        return False
    files = [Path(name) for name in made_of.read_text().replace("\\\n", " ").split()[1:]]
    return all(file.exists() and file.stat().st_mtime < obj.stat().st_mtime for file in files)


def show_progress(jobs: Iterator[None], count: int) -> None:
    """One line that counts files on a terminal, one line that stands elsewhere."""
    for done, _ in enumerate(jobs, 1):
        if sys.stderr.isatty() or done == count:
            end = "\n" if done == count else ""
            print(f"\rforge_c: compiled {done} of {count} C files", end=end, file=sys.stderr, flush=True)


class BuildExt(build_ext):
    """Compiles what changed, on all cores. Names the library plainly, adds OpenMP where the compiler has it, and
    records the flags for show_config()."""

    def get_ext_filename(self, fullname: str) -> str:
        plain = fullname.replace(".", "/") + ".so"
        return plain if LIBRARY.endswith(fullname) else super().get_ext_filename(fullname)

    def compiles(self, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() == 0; }\n")
            command = [*self.compiler.compiler_so, *flags, str(source), "-o", str(Path(folder, "probe"))]
            return subprocess.run([c for c in command if c != "-c"], capture_output=True).returncode == 0

    def compile_changed(self, sources: list[str], output_dir: str, macros: Any, extra_postargs: list[str],
                        **options: Any) -> list[str]:
        """In the place of the compiler's compile(): each set of flags has a folder of objects."""
        compiler, flags, include = self.compiler, [*extra_postargs, "-MMD"], options["include_dirs"]
        folder = f"{zlib.crc32(repr([compiler.compiler_so, macros, include, flags]).encode()):08x}"
        _, objects, _, cpp, build = compiler._setup_compile(
            str(Path(output_dir, folder)), macros, include, sources, options["depends"], flags)
        stale = sorted((o for o in objects if not is_fresh(Path(o))), key=lambda o: "isa" not in o)  # the longest first
        cc_args = compiler._get_cc_args(cpp, options["debug"], None)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            show_progress(pool.map(lambda o: compiler._compile(o, *build[o], cc_args, flags, cpp), stale), len(stale))
        return objects

    def build_extensions(self) -> None:
        openmp = ["-fopenmp"] if not os.environ.get("FORGE_C_NO_OPENMP") and self.compiles(["-fopenmp"]) else []
        library, module = self.extensions
        library.extra_compile_args = FLAGS + openmp
        library.extra_link_args += openmp
        library.define_macros = [("FC_BUILD_FLAGS", f'"{" ".join(FLAGS + openmp)}"')]
        module.extra_compile_args = FLAGS
        module.library_dirs.append(str(Path(self.get_ext_fullpath(LIBRARY)).parent))
        self.compiler.compile = self.compile_changed
        self.force = True  # always link: what is up to date depends on the flags
        self.parallel = False  # the library first
        super().build_extensions()


library = Extension(
    LIBRARY,
    sorted(glob("src_c/**/*.c", recursive=True)),
    depends=glob("src_c/**/*.h", recursive=True),
    include_dirs=["src_c"],
    libraries=["m"],
    # Its own functions are called directly, as if they were not exported.
    extra_link_args=["-Wl,-soname,libforge_c.so", "-Wl,-Bsymbolic-functions"],
)
module = Extension(
    "forge_c.functional",
    ["forge_c/functional.pyx"],
    depends=["src_c/forge.h", "src_c/formats.h", *glob("forge_c/border/*.pxi"), "forge_c/_c.pxd"],
    include_dirs=["src_c", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
    libraries=["forge_c"],
    runtime_library_dirs=["$ORIGIN"],
)

# forge_c.get_include(): the C API travels inside the package.
Path("forge_c/include").mkdir(exist_ok=True)
shutil.copy("src_c/forge.h", "forge_c/include")

setup(ext_modules=[library, *cythonize(module, include_path=["."])], cmdclass={"build_ext": BuildExt})
