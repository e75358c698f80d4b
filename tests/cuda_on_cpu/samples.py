"""Runs the programs of kernels/: correct, or with the bug that they are told to have."""

import functools
import os
import subprocess
from pathlib import Path

from . import build

KERNELS = Path(__file__).parent / "kernels"


def run(source: str, bug: str, sanitizer: str = "none") -> subprocess.CompletedProcess[str]:
    """The program's exit status is 0 when every value is right, 1 when one is wrong, 2 when a launch failed."""
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([_program(source, sanitizer), bug], env=env, capture_output=True, text=True, check=False)


@functools.cache
def _program(source: str, sanitizer: str) -> Path:
    return build.link(Path(source).stem, [KERNELS / source], sanitizer)
