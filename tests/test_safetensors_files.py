"""Safetensors files written by fastembed: read by the library of that name, without a second copy in memory."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastembed._safetensors import _DTYPES, read_safetensors, write_safetensors


def test_any_tensor_is_read_back_by_safetensors(tmp_path: Path) -> None:
    numbers = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    tensors = {str(dtype): numbers.to(dtype) for dtype in _DTYPES}
    tensors |= {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "transposed": numbers.T,
        "every other": numbers[::2, ::2],
        "shares its memory": numbers,
        "parameter": torch.nn.Parameter(numbers[0]),
        "ünïcode": torch.ones(3, dtype=torch.uint8),
    }
    path = tmp_path / "file.safetensors"
    write_safetensors(path, tensors, {"version": 1, "text": "ä"})
    mapped = load_file(path)
    read, settings = read_safetensors(path)
    assert settings == {"version": 1, "text": "ä"}
    assert mapped.keys() == read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for found in (mapped[name], read[name]):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(_bits(found), _bits(tensor)), name


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()])
def test_what_the_format_does_not_hold_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="weight must be dense and of a dtype of safetensors, got torch"):
        write_safetensors(tmp_path / "file.safetensors", {"weight": tensor}, {})
    assert not list(tmp_path.iterdir())


def test_writing_takes_no_second_copy_of_the_tensors(tmp_path: Path) -> None:
    tensors = {str(number): torch.full((1 << 22,), float(number)) for number in range(8)}  # 16 MiB each
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory starts again
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    before = _peak()
    write_safetensors(tmp_path / "file.safetensors", tensors, {})
    assert _peak() - before < 32 << 20


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _peak() -> int:
    """The most resident memory since the peak started, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) << 10
