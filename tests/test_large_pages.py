"""Weights in pages of 2 MB: values, places, and chunks that go with their last tensor."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from fastembed import _large_pages
from fastembed._large_pages import CHUNK_BYTES, SMALLEST_BYTES, in_large_pages
from fastembed.nn import QuantLinear


@pytest.fixture(autouse=True)
def _own_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_large_pages, "_chunk", None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nbytes", [SMALLEST_BYTES, SMALLEST_BYTES + 40, CHUNK_BYTES // 2, CHUNK_BYTES + 8])
def test_values_and_alignment(dtype: torch.dtype, nbytes: int) -> None:
    bytes_ = torch.randint(0, 255, (nbytes,), dtype=torch.uint8).view(dtype)
    tensors = [bytes_.view(2, -1), bytes_.view(2, -1).t(), bytes_]
    placed = [in_large_pages(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, placed, strict=True):
        assert copy.dtype == dtype
        assert copy.shape == tensor.shape
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
        assert torch.equal(copy.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    ends = [copy.data_ptr() + copy.nbytes for copy in placed]
    assert not any(
        a is not b and a.data_ptr() <= b.data_ptr() < end for a, end in zip(placed, ends, strict=True) for b in placed
    )


def test_others_are_left_where_they_are() -> None:
    class Kind(Tensor):
        pass

    small = torch.zeros(SMALLEST_BYTES - 1, dtype=torch.uint8)
    meta = torch.zeros(SMALLEST_BYTES, dtype=torch.uint8, device="meta")
    kind = torch.zeros(SMALLEST_BYTES, dtype=torch.uint8).as_subclass(Kind)
    assert all(in_large_pages(tensor) is tensor for tensor in (small, meta, kind))


def test_a_chunk_goes_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []

    class Pages(_large_pages.mmap.mmap):
        def __init__(self, *_: object, **__: object) -> None:
            chunks.append(weakref.ref(self))

    monkeypatch.setattr(_large_pages.mmap, "mmap", Pages)
    source = torch.ones(CHUNK_BYTES // 2, dtype=torch.uint8)
    first, second, third = (in_large_pages(source) for _ in range(3))
    assert [chunk() is None for chunk in chunks] == [False, False]  # two fit in one
    del first
    gc.collect()
    assert [chunk() is None for chunk in chunks] == [False, False]
    del second
    gc.collect()
    assert [chunk() is None for chunk in chunks] == [True, False]
    assert torch.equal(third, source)


def test_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(_large_pages.mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError

    monkeypatch.setattr(_large_pages.mmap, "mmap", Pages)
    source = torch.arange(SMALLEST_BYTES, dtype=torch.float32)
    assert torch.equal(in_large_pages(source), source)


def test_a_layer_made_in_inference_mode_spoils_no_other() -> None:
    with torch.inference_mode():
        QuantLinear.from_linear(torch.nn.Linear(512, 512))
    layer = QuantLinear.from_linear(torch.nn.Linear(512, 512))
    x = torch.randn(3, 512, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_layers_lie_there() -> None:
    linear = torch.nn.Linear(512, 512)
    made = QuantLinear.from_linear(linear, bits=4)
    loaded = QuantLinear(512, 512, bits=4)
    loaded.load_state_dict(made.state_dict())
    chunk = _large_pages._chunk
    assert chunk is not None
    for layer in (made, loaded):
        assert layer.codes.untyped_storage().data_ptr() == chunk.untyped_storage().data_ptr()
    x = torch.randn(3, 512)
    assert torch.equal(made(x), loaded(x))
