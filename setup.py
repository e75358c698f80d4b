"""Build of the compiled core: which sources, with which flags, for which instruction sets.

`csrc/` knows nothing of PyTorch, so one build serves every PyTorch version and needs only setuptools, pybind11 and
ninja. Two modules come out of it: `fastembed._core` (CPU, always) and `fastembed._cuda` (when nvcc is found).

Switches (environment): FASTEMBED_CUDA=auto|0|1, FASTEMBED_CUDA_ARCHS="80;90;100", FASTEMBED_SANITIZE=address,undefined,
MAX_JOBS, CXX, CXXFLAGS (after our own flags).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror=return-type",
]

# A source named *_<level>.cpp is compiled with these flags on top and runs only where csrc/common/isa.cpp finds every
# one of the features; the two lists must agree. Each level includes those it is built on.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2"]
AVXVNNI = [*AVX2, "-mavxvnni"]
# GCC 12 warns about the undefined vectors inside its own AVX-512 intrinsics.
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
AVX512VNNI = [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512vpopcntdq", "-mavx512bitalg", "-mgfni"]
# Not a level of its own: what a CPU of the level before may have on top (has_avx512bf16 in csrc/common/isa.hpp).
AVX512BF16 = [*AVX512VNNI, "-mavx512bf16"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avxvnni": AVXVNNI,
    "avx512": AVX512,
    "avx512vnni": AVX512VNNI,
    "avx512bf16": AVX512BF16,
}

# Sources by what their names begin with. Their float results have the same bits at every level: no multiplication
# and addition in one rounding where a level has an instruction for it.
EXACT_SOURCES = ("scalar_codes",)
EXACT_FLAGS = ["-ffp-contract=off"]

# The C++ halves of fastembed._cuda; its kernels are the *.cu files.
CUDA_BINDINGS = "bindings_cuda.cpp"
DEFAULT_CUDA_ARCHS = "80;90;100"


def is_x86_64() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def find_nvcc() -> str | None:
    """Path of nvcc when the CUDA kernels are to be built; None, with the reason printed, when not."""
    wanted = os.environ.get("FASTEMBED_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTEMBED_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        print("fastembed: CUDA kernels not built (FASTEMBED_CUDA=0)")
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None and wanted == "1":
        raise SystemExit("FASTEMBED_CUDA=1 but nvcc is neither on PATH nor under CUDA_HOME")
    print(f"fastembed: CUDA kernels {'built with ' + nvcc if nvcc else 'not built (no nvcc found)'}")
    return nvcc


def core_sources() -> list[Path]:
    sources = sorted(s for s in CSRC.rglob("*.cpp") if s.name != CUDA_BINDINGS)
    return [s for s in sources if isa_level(s) is None or is_x86_64()]


def isa_level(source: Path) -> str | None:
    suffix = source.stem.rsplit("_", 1)[-1]
    return suffix if suffix in ISA_FLAGS else None


class NinjaFile:
    """The few lines of ninja syntax this build needs."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.3"]

    def rule(self, name: str, command: str, *, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path, rule: str, inputs: list[Path], **variables: str) -> None:
        self.lines.append(f"build {self._path(output)}: {rule} {' '.join(map(self._path, inputs))}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]

    @staticmethod
    def _path(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def run(self, directory: Path) -> None:
        import ninja

        directory.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(directory)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        subprocess.run(command, check=True)


class BuildCore(build_ext):
    """Compiles each source with the flags of its instruction set, and CUDA sources with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(self.build_temp).resolve() / ext.name
        ninja_file = NinjaFile()
        if ext.name == "fastembed._core":
            self.plan_core(ninja_file, directory, target)
        else:
            self.plan_cuda(ninja_file, directory, target)
        ninja_file.run(directory)

    def plan_core(self, ninja_file: NinjaFile, directory: Path, target: Path) -> None:
        sources = core_sources()
        self.add_rules(ninja_file)
        objects = [self.compile(ninja_file, directory, source) for source in sources]
        ninja_file.build(target, "link", objects)

    def plan_cuda(self, ninja_file: NinjaFile, directory: Path, target: Path) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None, "fastembed._cuda is only listed when nvcc was found"
        self.add_rules(ninja_file)
        archs = sorted(os.environ.get("FASTEMBED_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split(";"), key=int)
        gencode = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
        gencode += f" -gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"  # for what is newer
        nvcc_flags = f"-std=c++17 -O3 -lineinfo --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -I{CSRC}"
        ninja_file.rule("nvcc", f"{nvcc} {nvcc_flags} {gencode} -MD -MF $out.d -c $in -o $out", depfile=True)
        objects = [self.compile(ninja_file, directory, source) for source in sorted(CSRC.rglob(CUDA_BINDINGS))]
        for source in sorted(CSRC.rglob("*.cu")):
            objects.append(directory / source.relative_to(CSRC).with_suffix(".cu.o"))
            ninja_file.build(objects[-1], "nvcc", [source])
        ninja_file.rule("nvcc_link", f"{nvcc} -shared -cudart static $in -o $out")
        ninja_file.build(target, "nvcc_link", objects)

    def add_rules(self, ninja_file: NinjaFile) -> None:
        import pybind11

        compiler = os.environ.get("CXX", "c++")
        sanitizers = os.environ.get("FASTEMBED_SANITIZE")
        sanitize = (
            f"-fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1" if sanitizers else ""
        )
        includes = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
        more = os.environ.get("CXXFLAGS", "")
        flags = " ".join([*CXX_FLAGS, sanitize, more, *(f"-I{path}" for path in includes)])
        ninja_file.rule("cxx", f"{compiler} {flags} $isa -MD -MF $out.d -c $in -o $out", depfile=True)
        ninja_file.rule("link", f"{compiler} -shared -fopenmp {sanitize} $in -o $out")

    def compile(self, ninja_file: NinjaFile, directory: Path, source: Path) -> Path:
        output = directory / source.relative_to(CSRC).with_suffix(".o")
        level = isa_level(source)
        flags = [*(ISA_FLAGS[level] if level else []), *(EXACT_FLAGS if source.stem.startswith(EXACT_SOURCES) else [])]
        ninja_file.build(output, "cxx", [source], isa=" ".join(flags))
        return output


extensions = [Extension("fastembed._core", [str(s.relative_to(ROOT)) for s in core_sources()])]
if find_nvcc():
    extensions.append(Extension("fastembed._cuda", ["csrc/bindings_cuda.cpp"]))

if sys.platform != "linux":
    print("fastembed: only Linux is supported and tested; trying anyway")

setup(ext_modules=extensions, cmdclass={"build_ext": BuildCore})
