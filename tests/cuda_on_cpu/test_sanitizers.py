"""The kernel suites once more, in processes whose kernels are instrumented.

ThreadSanitizer sees each CUDA thread as a thread of its own and each barrier as what it orders, so it finds races in
whichever order the threads run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import build

FOLDER = Path(__file__).parent
SUITES = [
    path
    for path in sorted(FOLDER.glob("test_*.py"))
    if path.stem not in ("test_rewriter", "test_injected_bugs", "test_injected_ptx_bugs", Path(__file__).stem)
]


def run(sanitizer: str, *arguments: str) -> None:
    build.module(sanitizer)  # here, because compilers need not run under a sanitizer's run time
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, *map(str, SUITES)]
    env = {**os.environ, **build.sanitizer_environment(sanitizer), "CUDA_ON_CPU_SANITIZER": sanitizer}
    result = subprocess.run(command, cwd=build.ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-10000:]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_selection(sanitizer: str) -> None:
    """One thread order and a few shapes."""
    run(sanitizer, "-k", "sanitized")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_everything(sanitizer: str) -> None:
    run(sanitizer)
