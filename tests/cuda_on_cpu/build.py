"""Compiles CUDA sources for the CPU: the rewritten .cu files, the shim, and the bindings, by g++.

Objects and modules are cached under build/cuda_on_cpu/, keyed by the content of everything that goes into them.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from . import rewriter

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SHIM = Path(__file__).resolve().parent / "shim"
CACHE = ROOT / "build" / "cuda_on_cpu"

SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
# Only .cu files are instrumented. The simulated machine's own bookkeeping is no business of the sanitizers'; it tells
# them of its fibers instead, for which it must know which one is there.
SHIM_FLAGS = {"none": [], "address": ["-DCUDA_ON_CPU_ASAN"], "thread": ["-DCUDA_ON_CPU_TSAN"]}
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-attributes",
    "-Wno-unknown-pragmas",
]


def unavailable_reason() -> str | None:
    """Why the harness cannot run here, or None when it can."""
    if platform.machine() != "x86_64":
        return "tests/cuda_on_cpu switches fibers in x86-64 assembly"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler ({compiler()})"
    if cuda_include_folders() is None:
        return (
            "the CUDA toolkit's headers were not found: neither CUDA_HOME, nvcc nor the packages "
            "nvidia-cuda-runtime and nvidia-cuda-crt"
        )
    return None


def compiler() -> str:
    # ThreadSanitizer's run time as g++ 12 ships it handles thousands of fibers; newer ones have 255 slots.
    return os.environ.get("CXX") or ("g++-12" if shutil.which("g++-12") else "g++")


@functools.cache
def cuda_include_folders() -> tuple[Path, ...] | None:
    """Folders that together hold cuda_runtime.h, cuda_fp16.h and crt/host_defines.h."""
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        toolkits.append(str(Path(nvcc).resolve().parents[1]))
    folders = [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    if (namespace := importlib.util.find_spec("nvidia")) is not None:
        for location in namespace.submodule_search_locations or ():
            folders += sorted(Path(location).glob("*/include"))
    needed = ("cuda_runtime.h", "cuda_fp16.h", "crt/host_defines.h")
    found = [next((folder for folder in folders if (folder / header).is_file()), None) for header in needed]
    return None if None in found else tuple(dict.fromkeys(folder for folder in found if folder))


def module(sanitizer: str = "none") -> Path:
    """The whole of csrc's CUDA part as a Python module: a drop-in for `fastembed._cuda`."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    return link(
        f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}",
        [*cuda_sources(), *sorted(CSRC.rglob("bindings_cuda.cpp"))],
        sanitizer,
        includes=includes,
        shared=True,
    )


def load(path: Path) -> ModuleType:
    """Import a module that `module` built."""
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.simulated = True  # type: ignore[attr-defined]
    return loaded


def cuda_sources() -> list[Path]:
    return sorted(CSRC.rglob("*.cu"))


def link(
    name: str,
    sources: Iterable[Path],
    sanitizer: str = "none",
    *,
    includes: Sequence[str] = (),
    shared: bool = False,
) -> Path:
    """Compile `sources` (.cu and .cpp) with the shim into a program or, if `shared`, a library called `name`."""
    folders = cuda_include_folders()
    assert folders is not None, unavailable_reason()
    mirror = _rewritten_tree()
    include_flags = [f"-I{path}" for path in (SHIM, mirror, CSRC, *includes)]
    include_flags += [flag for path in folders for flag in ("-isystem", str(path))]
    jobs: list[tuple[Path, list[str]]] = [
        (source, [*FLAGS, *SHIM_FLAGS[sanitizer], *include_flags]) for source in sorted(SHIM.glob("*.cpp"))
    ]
    for source in sources:
        flags = [*FLAGS, *include_flags]
        if source.suffix == ".cu":
            source = _rewritten(source, mirror)
            flags += [*SANITIZERS[sanitizer], "-include", str(SHIM / "device.hpp")]
        jobs.append((source, flags))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # Uninstrumented copies of the standard library's inline functions come first, for the linker takes the first.
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    key = _digest([*map(str, objects), name, str(shared)])
    output = CACHE / key / name
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        mode = ["-shared"] if shared else []
        _run([compiler(), *mode, *SANITIZERS[sanitizer], *map(str, objects), "-o"], output)
    return output


def sanitizer_environment(sanitizer: str) -> dict[str, str]:
    """What a Python process needs in its environment to load a module built with `sanitizer`."""
    if sanitizer == "none":
        return {}
    # libstdc++ too: the sanitizer must find __cxa_throw before Python loads the module.
    libraries = ({"address": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so")
    return {
        "LD_PRELOAD": " ".join(map(_runtime_library, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"halt_on_error=1:suppressions={ROOT / 'tests' / 'tsan_suppressions.txt'}",
    }


def _runtime_library(name: str) -> str:
    command = [compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _rewritten_tree() -> Path:
    """csrc's .cuh headers, rewritten, in a folder that stands before csrc on the include path."""
    headers = sorted(CSRC.rglob("*.cuh"))
    texts = {header: rewriter.rewrite_file(header, str(header.relative_to(ROOT))) for header in headers}
    tree = CACHE / _digest([f"{header}\n{text}" for header, text in texts.items()])
    for header, text in texts.items():
        _write(tree / header.relative_to(CSRC), text)
    tree.mkdir(parents=True, exist_ok=True)
    return tree


def _rewritten(source: Path, mirror: Path) -> Path:
    name = source.resolve().relative_to(ROOT)
    target = mirror / "sources" / name.with_suffix(".cu.cpp")
    text = rewriter.rewrite_file(source, str(name))
    if not target.exists() or target.read_text() != text:
        _write(target, text)
    return target


def _compile(source: Path, flags: list[str]) -> Path:
    command = [compiler(), *flags, "-c", str(source)]
    inputs = subprocess.run([*command, "-E", "-P"], capture_output=True, text=True, check=False)
    if inputs.returncode != 0:
        raise RuntimeError(f"{source}:\n{inputs.stderr}")
    output = CACHE / f"{_digest([*command, inputs.stdout])}.o"
    if not output.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        _run([*command, "-o"], output)
    return output


def _run(command: list[str], output: Path) -> None:
    """Run a compiler command that ends in -o; the output appears whole or not at all."""
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    result = subprocess.run([*command, str(partial)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    partial.replace(output)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:20]
