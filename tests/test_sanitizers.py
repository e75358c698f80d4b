"""A short run of the CPU suites on an instrumented core; `python tests/sanitize.py address|thread` is the long one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZE = Path(__file__).with_name("sanitize.py")


@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers' runtimes come with g++")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_cpu_suites_run_clean(sanitizer: str) -> None:
    result = subprocess.run(
        [sys.executable, str(SANITIZE), sanitizer, "-q", "-x", "--hypothesis-profile=quick"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
