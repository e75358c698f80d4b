"""Builds the core with a sanitizer and runs the CPU suites on it.

    python tests/sanitize.py address [pytest arguments]    AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/sanitize.py thread  [pytest arguments]    ThreadSanitizer

The instrumented package is built under build/sanitize-<name>/ and leaves the installed one alone. Needs g++.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
# AddressSanitizer's checks take GCC minutes to optimise at -O3, and none is lost at -O1. ThreadSanitizer keeps -O3: GCC
# 12 miscompiles the kernels with it at -O1.
FLAGS = {"address": "-O1", "thread": ""}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python and PyTorch keep memory until the process ends: leaks are not looked for.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {"TSAN_OPTIONS": f"halt_on_error=1:suppressions={ROOT / 'tests' / 'tsan_suppressions.txt'}"},
}
# torch.compile, torch.export and Ray start processes of their own, which have nothing to do with the core.
SELECTION = {
    "address": "not compile and not export and not opcheck and not test_index_ray",
    "thread": "thread or concurrent",
}
# Beginnings of the names of the suites that run kernels or read index files.
SUITES = (
    "test_fde",
    "test_index",
    "test_latent",
    "test_pooling",
    "test_qmatmul",
    "test_quant_linear",
    "test_relative",
    "test_scalar_codes",
    "test_search",
)


def build(name: str) -> Path:
    """Build the instrumented package; returns the folder to put on PYTHONPATH."""
    base = ROOT / "build" / f"sanitize-{name}"
    env = {**os.environ, "FASTEMBED_SANITIZE": SANITIZERS[name], "CXXFLAGS": FLAGS[name], "FASTEMBED_CUDA": "0"}
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        str(base),
        "--build-lib",
        str(base / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    return base / "lib"


def environment(name: str, package: Path) -> dict[str, str]:
    # libstdc++ too: the sanitizer must find __cxa_throw before Python loads the core.
    preload = " ".join(_runtime_library(library) for library in (RUNTIMES[name], "libstdc++.so"))
    return {**os.environ, **OPTIONS[name], "LD_PRELOAD": preload, "PYTHONPATH": str(package)}


def _runtime_library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def suites() -> list[str]:
    return [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if path.stem.startswith(SUITES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=SANITIZERS)
    arguments, pytest_arguments = parser.parse_known_args()
    env = environment(arguments.sanitizer, build(arguments.sanitizer))
    pytest_command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "pythonpath=",
        "-k",
        SELECTION[arguments.sanitizer],
    ]
    # From tests/, since the checkout's root on sys.path would put the installed core before the instrumented one.
    return subprocess.run([*pytest_command, *suites(), *pytest_arguments], cwd=ROOT / "tests", env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
