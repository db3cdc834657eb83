"""The operators' kernel for CPUs: built when it is first needed, kept in a cache, loaded once a process.

`cpu_kernels.cpp` comes with the package as source, because what is fast depends on the processor. It is
built by the compiler that `torch.compile` uses, with the same options, and registers itself with the
operators of `arkv.attention.operators`. Where it cannot be built, the plain functions do the work.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from arkv.errors import one_line, warn

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of queries."""


@cache
def load() -> bool:
    """Whether the kernel is there; builds and loads it at the first call.

    What goes wrong is said in one warning, once a process.
    """
    try:
        torch.ops.load_library(str(built()))
    # A compiler, a file system and a loader have many ways to fail, and none is a reason not to draw.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if "error:" in line), one_line(error))
        warn(f"attention is slower than it could be, since its kernel could not be built: {reason[:200]}")
        return False
    return True


def use_threads(count: int) -> None:
    """Let the operations that this thread starts take so many threads, and nobody else's.

    `torch.set_num_threads` decides for threads that have yet to begin, too. The kernel has to be there.
    """
    torch.ops.arkv.use_threads(count)


def built() -> Path:
    """The library, built if there is none yet; of several processes one builds, and the others wait for it.

    Raises:
        OSError: there is no compiler, or no place for the library.
        RuntimeError: the compiler failed.
    """
    compiler = find_compiler()
    folder = cache_folder()
    library = folder / f"arkv_attention_{key(compiler)}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            if sys.stderr is not None:
                sys.stderr.write("arkv: building the attention kernel for this processor, once\n")
                sys.stderr.flush()
            with tempfile.TemporaryDirectory(dir=folder) as place:
                os.replace(build(compiler, Path(place)), library)
    return library


def build(compiler: str, folder: Path) -> Path:
    """Compile the kernel into a folder, as Inductor compiles its own."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchOptions(vec_isa=pick_vec_isa(), compiler=compiler, warning_all=False)
    builder = CppBuilder("arkv_attention", str(SOURCE), options, str(folder))
    builder.build()
    return Path(builder.get_target_file_path())


def find_compiler() -> str:
    """Path of the compiler: what the variable CXX names, else the system's usual one.

    Raises:
        FileNotFoundError: there is none.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"there is no C++ compiler {name!r}; install one, or name another by CXX")
    return found


def cache_folder() -> Path:
    """Where torch keeps extensions that it has built; TORCH_EXTENSIONS_DIR names another place."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def key(compiler: str) -> str:
    """What a library was built from, by and for: source, torch, compiler and processor."""
    parts = [
        SOURCE.read_text(encoding="utf-8"),
        torch.__version__,
        str(torch.version.git_version),
        subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout,
        torch.backends.cpu.get_cpu_capability(),
        *_processor(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """What decides about the instructions that the compiler may take."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return [*dict.fromkeys(line for line in lines if line.startswith(("flags", "Features")))]
