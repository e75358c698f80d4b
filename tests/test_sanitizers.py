"""A short run of the CPU suites on an instrumented core; `python tests/sanitize.py address|thread` is the long one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZE = Path(__file__).with_name("sanitize.py")
# Modules and ops around kernels that the remaining suites run as well.
LEFT_TO_THE_LONG_RUN = ("test_index.py", "test_latent_op.py", "test_pooling_op.py", "test_quant_linear.py")


@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers' runtimes come with g++")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_cpu_suites_run_clean(sanitizer: str) -> None:
    left_out = [f"--deselect=tests/{suite}" for suite in LEFT_TO_THE_LONG_RUN]
    result = subprocess.run(
        [sys.executable, str(SANITIZE), sanitizer, "-q", "-x", "--hypothesis-profile=quick", *left_out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
