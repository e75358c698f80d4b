"""Asynchronous copies and tensor-core products: kernels/tensor_core_samples.cu fills fragments by the PTX ISA's own
formulas and compares with plain loops, so the correct program verifies the simulated layouts; and every bug that it can
be given is found by the modes named here."""

from pathlib import Path

import pytest

from bench.static.cuda import ARCHS, _compile, nvcc

from . import samples

SOURCE = "tensor_core_samples.cu"

FOUND_LATE = ("missing_wait", "wait_for_too_few", "missing_commit", "barrier_before_wait")
FOUND_EAGER = ("overwritten_while_read",)
FOUND_ALWAYS = (
    "missing_barrier",
    "missing_zero_fill",
    "swapped_a_registers",
    "wrong_b_column",
    "transposed_result",
    "wrong_matrix_order",
    "untransposed_rows",
)
ERRORS = {
    "misaligned_copy": "cp.async at tensor_core_samples.cu",
    "misaligned_row": "ldmatrix at tensor_core_samples.cu",
    "mma_in_branch": "mma_",
}
RACES = {"barrier_before_wait": "late", "missing_barrier": "late", "overwritten_while_read": "eager"}


@pytest.mark.parametrize("sanitizer", ["none", "address"])
def test_the_correct_program_passes(thread_order: str, copies: str, sanitizer: str) -> None:
    result = samples.run(SOURCE, "none", sanitizer)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


@pytest.mark.parametrize("bug", FOUND_ALWAYS)
def test_wrong_values_in_every_mode(thread_order: str, copies: str, bug: str) -> None:
    assert samples.run(SOURCE, bug).stdout == "WRONG\n"


@pytest.mark.parametrize("bug", FOUND_LATE)
def test_what_is_not_waited_for_is_seen_when_copies_are_late(
    thread_order: str, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", "late")
    assert samples.run(SOURCE, bug).stdout == "WRONG\n"
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", "eager")
    assert samples.run(SOURCE, bug).stdout == "right\n"


@pytest.mark.parametrize("bug", FOUND_EAGER)
def test_what_is_overwritten_too_early_is_seen_when_copies_are_eager(
    thread_order: str, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", "eager")
    assert samples.run(SOURCE, bug).stdout == "WRONG\n"
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", "late")
    assert samples.run(SOURCE, bug).stdout == "right\n"


@pytest.mark.parametrize("bug", ERRORS)
def test_undefined_behaviour_is_an_error(thread_order: str, bug: str) -> None:
    result = samples.run(SOURCE, bug)
    assert result.returncode == 2
    assert ERRORS[bug] in result.stdout


def test_thread_sanitizer_passes_the_correct_program(thread_order: str, copies: str) -> None:
    result = samples.run(SOURCE, "none", "thread")
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


@pytest.mark.parametrize("bug", RACES)
def test_thread_sanitizer_finds_races(thread_order: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", RACES[bug])
    result = samples.run(SOURCE, bug, "thread")
    assert result.returncode != 0
    assert "data race" in result.stderr


@pytest.mark.skipif(nvcc() is None, reason="nvcc was found neither on PATH nor under CUDA_HOME")
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in ARCHS])
def test_nvcc_takes_the_same_source(arch: int, tmp_path: Path) -> None:
    kept = ("--keep", "--keep-dir", str(tmp_path))
    _compile(samples.KERNELS / SOURCE, f"-arch=sm_{arch}", "--cubin", tmp_path / "samples.cubin", *kept)
    text = (tmp_path / Path(SOURCE).with_suffix(".ptx")).read_text()
    for operation in ("m16n8k32", "m16n8k16", "m16n8k256", "xor.popc", "and.popc", "ldmatrix", "cp.async.cg"):
        assert operation in text
