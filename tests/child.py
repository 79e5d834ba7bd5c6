"""Scripts in a process of their own: what happens at import, at a signal, after a fork, at exit."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import forge_c

TESTS = Path(__file__).parent
PACKAGE_PARENT = Path(forge_c.__file__).parents[1]


def run_script(source: str, *flags: str, timeout: float = 120, expect: int = 0, **env: str) -> str:
    """Run `source` with this interpreter and this forge_c, fail unless it exits with `expect`; its output."""
    path = [str(PACKAGE_PARENT), str(TESTS), os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **env}
    # From Python 3.12 on a fork beside other threads warns; that it works here is what the tests show.
    flags = ("-W", "ignore:This process:DeprecationWarning", *flags)
    done = subprocess.run([sys.executable, *flags, "-c", textwrap.dedent(source)], env=settings, text=True,
                          capture_output=True, timeout=timeout)
    assert done.returncode == expect, f"exit status {done.returncode}, expected {expect}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def limit_address_space(nbytes: int) -> None:
    """For this process, in which reading without end is then an error of the test and not of the machine.

    Not under AddressSanitizer (tools/check_sanitizers.sh): its map of all memory alone is terabytes.
    """
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


def compile_c(*arguments: str | Path) -> None:
    """Run the C compiler, CC or cc. The suite needs one as the build does: without it a test fails."""
    command = [*shlex.split(os.environ.get("CC", "cc")), *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def run_c(folder: Path, source: str) -> tuple[int, str]:
    """Exit status and output of a C program that is linked to the library; run by $EMULATOR if there is one."""
    code, program, library = folder / "program.c", folder / "program", forge_c.get_library_dir()
    code.write_text(source)
    compile_c("-std=gnu11", "-Wall", "-Wextra", "-Werror", code, f"-I{forge_c.get_include()}", f"-L{library}",
              "-lforge_c", f"-Wl,-rpath,{library}", "-o", program)
    emulator = os.environ.get("EMULATOR", "").split()
    done = subprocess.run([*emulator, str(program)], text=True, capture_output=True)
    return done.returncode, done.stdout
