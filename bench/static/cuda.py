"""Registers, spills, shared memory and instruction counts of the CUDA C++ kernels, as nvcc compiles them."""

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import KernelResources

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ARCHS = (80, 90, 100)
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", "-Xptxas", "-v")

_KERNEL = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'")
_STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_USED = re.compile(r"Used (?P<registers>\d+) registers.*")
_SHARED = re.compile(r"(\d+) bytes smem")

# PTX whose number says whether a kernel does what it claims: wide loads and stores, tensor cores, atomics
# (barriers that reduce, `barrier.cta.red`, are none).
_NOTED = re.compile(
    r"(?P<load>ld\.global[.\w:]*?\.v4)|(?P<store>st\.global[.\w:]*?\.v4)|(?P<mma>\bmma\.sync[.\w]*)|"
    r"(?P<async>cp\.async\.c\w)|(?P<matrix>\bldmatrix\.)|(?P<atomic>(?<![.\w])(?:atom|red)\.[.\w]*)"
)
_NAMES = {
    "load": "16-byte loads",
    "store": "16-byte stores",
    "async": "cp.async",
    "matrix": "ldmatrix",
    "atomic": "atomics",
}


def nvcc() -> str | None:
    """Path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def rows(archs: Sequence[int] = ARCHS) -> list[KernelResources]:
    """Every kernel of every .cu file, for every one of the architectures.

    Raises:
        RuntimeError: there is no nvcc, or it refuses a file.
    """
    sources = [source for source in sorted(CSRC.rglob("*.cu")) if "<<<" in source.read_text()]
    return [row for source in sources for row in _resources(source, archs)]


def _resources(source: Path, archs: Sequence[int]) -> list[KernelResources]:
    toolchain = f"nvcc {_version()}"
    result = []
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            kept = ("--keep", "--keep-dir", folder)  # its PTX
            _, log = _compile(source, f"-arch=sm_{arch}", "--cubin", Path(folder) / "out.cubin", *kept)
            notes = _notes_by_kernel((Path(folder) / f"{source.stem}.ptx").read_text())
            for kernel in _parse(log):
                result.append(
                    KernelResources(
                        kernel=f"{source.parent.name}.{_readable(kernel['name'])}",
                        toolchain=toolchain,
                        arch=f"sm_{arch}",
                        registers=int(kernel["registers"]),
                        spill_bytes=int(kernel["stores"]) + int(kernel["loads"]),
                        stack_bytes=int(kernel["stack"]),
                        shared_bytes=int(kernel["shared"]),
                        notes=notes.get(kernel["name"], ""),
                    )
                )
    return sorted(result, key=lambda row: (row.kernel, int(row.arch.removeprefix("sm_"))))


def _compile(source: Path, arch: str, kind: str, output: Path, *more: str) -> tuple[Path, str]:
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was found neither on PATH nor under CUDA_HOME")
    command = [compiler, *FLAGS, arch, kind, *more, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return output, result.stdout + result.stderr


def _parse(log: str) -> list[dict[str, str]]:
    """The kernels that ptxas -v speaks of."""
    kernels: list[dict[str, str]] = []
    for line in log.splitlines():
        if match := _KERNEL.search(line):
            kernels.append(match.groupdict())
        elif kernels and (match := _STACK.search(line)):
            kernels[-1] |= match.groupdict()
        elif kernels and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels[-1] |= {"registers": match["registers"], "shared": shared[1] if shared else "0"}
    return kernels


def _notes_by_kernel(ptx: str) -> dict[str, str]:
    notes = {}
    for entry in re.split(r"\.entry ", ptx)[1:]:
        counts = Counter(_note(match) for match in _NOTED.finditer(entry))
        notes[re.match(r"\w+", entry)[0]] = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))  # type: ignore[index]
    return notes


def _note(instruction: re.Match[str]) -> str:
    if instruction.lastgroup == "mma":
        # mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32: shape, and the types of the factors
        _, _, _, shape, _, _, _, *factors = instruction["mma"].split(".")
        return f"mma.{shape} {'.'.join(factors[:2])}"
    return _NAMES[instruction.lastgroup or ""]


def _readable(mangled: str) -> str:
    """Name and template arguments: `reduce_chunks[__half, WeightedSum, true]`."""
    command = ["c++filt", "--no-params", mangled]
    demangled = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    name, _, arguments = demangled.removesuffix(">").partition("<")
    short = [argument.split("::")[-1].split(")")[-1].strip() for argument in arguments.split(",")]
    return name.split("::")[-1] + (f"[{', '.join(short)}]" if arguments else "")


def _version() -> str:
    compiler = nvcc()
    assert compiler is not None
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V([\d.]+)", text)
    return match[1] if match else "?"
