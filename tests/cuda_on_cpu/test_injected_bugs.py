"""The harness finds what it is for: every bug that kernels/samples.cu can be given is found by the modes named here,
and the correct program passes all of them."""

import subprocess

import pytest

from . import build, samples

ERRORS = {
    "divergent_barrier": "divergent __syncthreads",
    "barrier_after_exit": "has left the kernel",
    "shuffle_in_branch": "__shfl_xor_sync",
    "shuffle_outside_mask": "which is not in the mask",
    "deadlock": "deadlock",
    "bad_launch": "invalid launch configuration",
}
WRONG_VALUES = ("missing_second_barrier", "warp_synchronous")
OUT_OF_BOUNDS = {
    "global_read_past_end": "heap-buffer-overflow",
    "shared_index_overflow": "out of bounds",
    "dynamic_shared_too_small": "heap-buffer-overflow",
}
RACES = ("missing_barrier", "missing_second_barrier", "cross_block_sum", "warp_synchronous")


def run(bug: str, sanitizer: str = "none") -> subprocess.CompletedProcess[str]:
    return samples.run("samples.cu", bug, sanitizer)


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_the_correct_program_passes(thread_order: str, sanitizer: str) -> None:
    result = run("none", sanitizer)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


@pytest.mark.parametrize("bug", ERRORS)
def test_undefined_behaviour_is_an_error(thread_order: str, bug: str) -> None:
    result = run(bug)
    assert result.returncode == 2
    assert ERRORS[bug] in result.stdout
    assert "kernel" in result.stdout


@pytest.mark.parametrize("bug", WRONG_VALUES)
def test_missing_synchronisation_gives_wrong_values(thread_order: str, bug: str) -> None:
    assert run(bug).stdout == "WRONG\n"


def test_values_alone_miss_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there are several orders, and sanitizers besides."""
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", "desc")
    assert run("missing_barrier").stdout == "right\n"
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", "asc")
    assert run("missing_barrier").stdout == "WRONG\n"
    assert run("cross_block_sum").stdout == "right\n"


@pytest.mark.parametrize("bug", OUT_OF_BOUNDS)
def test_address_sanitizer_finds_accesses_out_of_bounds(bug: str) -> None:
    result = run(bug, "address")
    assert result.returncode != 0
    assert OUT_OF_BOUNDS[bug] in result.stderr
    assert "samples.cu" in result.stderr


@pytest.mark.parametrize("bug", RACES)
def test_thread_sanitizer_finds_races(thread_order: str, bug: str) -> None:
    result = run(bug, "thread")
    assert result.returncode != 0
    assert "data race" in result.stderr
    assert "samples.cu" in result.stderr
