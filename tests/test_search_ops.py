"""The search ops as PyTorch sees them, and what they do with bad input."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.library import opcheck

import fastembed
from fastembed import SDCCodes, hamming_range, hamming_topk, pack_bits, rescore, sdc_encode, sdc_topk, unpack_bits

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(50, 40, generator=GENERATOR)
BITS = pack_bits(X)
SDC = sdc_encode(X, 2)
IDS = torch.randint(0, 50, (50, 9), generator=GENERATOR)

MASK = X[:, 0] > 0
RANGES = torch.tensor([[0, 20], [30, 50]]).expand(5, 2, 2)

OPS: dict[str, tuple[Any, ...]] = {
    "pack_bits": (X, X[0]),
    "unpack_bits": (BITS, 40),
    "hamming_topk": (BITS[:5], BITS, 3, MASK, None, RANGES),
    "hamming_range": (BITS[:5], BITS, 18, None, MASK.nonzero().squeeze(1), RANGES),
    "sdc_encode": (X, 2),
    "sdc_topk": (SDC.codes[:5], SDC.inverse_norms[:5], SDC.codes, SDC.inverse_norms, 2, 40, 3),
    "rescore": (X, X, IDS, 4),
}
NO_QUERIES: dict[str, tuple[Any, ...]] = {
    "pack_bits": (X[:0],),
    "unpack_bits": (BITS[:0], 40),
    "hamming_topk": (BITS[:0], BITS, 3),
    "hamming_range": (BITS[:0], BITS, 3),
    "sdc_encode": (X[:0], 3),
    "sdc_topk": (SDC.codes[:0], SDC.inverse_norms[:0], SDC.codes, SDC.inverse_norms, 2, 40, 3),
    "rescore": (X[:0], X, IDS[:0], 4),
}


def strided(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.mT.contiguous().mT if isinstance(arg, torch.Tensor) and arg.dim() == 2 else arg for arg in args)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("make", [dict.get, lambda ops, name: strided(ops[name]), lambda _, name: NO_QUERIES[name]])
def test_opcheck(name: str, make: Callable[..., tuple[Any, ...]]) -> None:
    opcheck(getattr(torch.ops.fastembed, name).default, make(OPS, name))


@pytest.mark.parametrize("name", OPS)
def test_reference_and_kernels_agree(name: str) -> None:
    op = getattr(torch.ops.fastembed, name).default
    for args in (OPS[name], NO_QUERIES[name]):
        ours = op(*args)
        with fastembed.use_backend("reference"):
            expected = op(*args)
        torch.testing.assert_close(ours, expected, rtol=1e-5 if name == "rescore" else 0, atol=0)


@pytest.mark.parametrize("name", ["sdc_encode", "rescore"])
def test_backward_raises(name: str) -> None:
    x, *rest = OPS[name]
    output = getattr(torch.ops.fastembed, name).default(x.clone().requires_grad_(), *rest)
    floating = next(tensor for tensor in output if tensor.is_floating_point())
    with pytest.raises(NotImplementedError, match=name):
        floating.sum().backward()


def search_everything(x: torch.Tensor, k: int) -> list[torch.Tensor]:
    distances, ids = hamming_topk(pack_bits(x[:5]), pack_bits(x), k)
    scores, sdc_ids = sdc_topk(x[:5], sdc_encode(x, 2), k)
    return [distances, ids, scores, sdc_ids, *rescore(x[:5], x, ids, k)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(search_everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for ours, expected in zip(compiled(X, 3), search_everything(X, 3), strict=True):
        assert torch.equal(ours, expected)


def test_exports_and_runs_under_inference_mode_and_autocast() -> None:
    class Search(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return search_everything(x, 3)

    expected = search_everything(X, 3)
    exported = torch.export.export(Search(), (X,)).module()(X)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inferred = search_everything(X, 3)
    for result in (exported, inferred):
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


# ---- bad input ----

N = np.asarray
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: pack_bits([1.0]), TypeError, "x must be a NumPy array or a tensor"),
    (lambda: pack_bits(X.int()), TypeError, "x must be bfloat16 or float16 or float32 or float64, got"),
    (lambda: pack_bits(N(X).astype(">f4")), TypeError, "x must be bfloat16 or float16 or float32 or float64, got"),
    (lambda: pack_bits(N(1.0)), ValueError, "x must have at least one axis"),
    (lambda: hamming_topk(BITS, BITS, 51), ValueError, "k must be between 1 and 50, got 51"),
    (lambda: hamming_topk(N(BITS), N(BITS), 51), ValueError, "k must be between 1 and 50, got 51"),
    (lambda: hamming_topk(BITS, BITS, 0), ValueError, "k must be between 1 and 50, got 0"),
    (lambda: hamming_topk(BITS, BITS, -1), ValueError, "k must be between 1 and 50, got -1"),
    (lambda: hamming_topk(N(BITS), N(BITS), 2**70), ValueError, "k must be between"),
    (lambda: hamming_topk(BITS, BITS, 1.0), TypeError, "k must be an integer"),
    (lambda: hamming_topk(BITS, BITS, True), TypeError, "k must be an integer"),
    (lambda: hamming_topk(BITS, BITS, None), TypeError, "k must be an integer"),
    (lambda: hamming_topk(BITS, BITS[:0], 1), ValueError, "k must be at most the number of codes, but there are none"),
    (lambda: sdc_topk(SDC, SDC[:0], 1), ValueError, "k must be at most the number of codes, but there are none"),
    (lambda: rescore(X, X, IDS[:, :0], 1), ValueError, "k must be at most the number of candidates"),
    (lambda: hamming_topk(BITS[0], BITS, 1), ValueError, r"queries must have shape \[rows, columns\], got \[5\]"),
    (lambda: hamming_topk(BITS, BITS[0], 1), ValueError, "codes must have shape"),
    (lambda: hamming_topk(BITS[:, 1:], BITS, 1), ValueError, "queries must have the 5 bytes of the codes, got 4"),
    (lambda: hamming_topk(BITS.int(), BITS, 1), TypeError, "queries must be uint8, got torch.int32"),
    (lambda: hamming_topk(BITS, BITS.view(torch.int8), 1), TypeError, "codes must be uint8"),
    (lambda: hamming_topk(N(BITS), BITS, 1), TypeError, "queries and codes must be all NumPy arrays or all tensors"),
    (lambda: hamming_topk(BITS, None, 1), TypeError, "codes must be a NumPy array or a tensor, got NoneType"),
    (lambda: hamming_topk(BITS, BITS.to("meta"), 1), ValueError, "codes must be on the device of the queries"),
    (lambda: pack_bits(X, thresholds=X[0].double()), TypeError, "thresholds must be float32"),
    (lambda: pack_bits(X, thresholds=X[0, 1:]), ValueError, "thresholds must have a value for each of 40 dims, got 39"),
    (lambda: pack_bits(X, thresholds=N(X[0])), TypeError, "x and thresholds must be all NumPy arrays or all tensors"),
    (lambda: unpack_bits(BITS, 41), ValueError, "codes must be 6 bytes wide for dim 41, got 5"),
    (lambda: unpack_bits(X, 40), TypeError, "codes must be uint8"),
    (lambda: unpack_bits(BITS, -1), ValueError, "dim must be at least 0, got -1"),
    (lambda: hamming_range(BITS, BITS, -1), ValueError, "radius must be at least 0, got -1"),
    (lambda: hamming_range(BITS, BITS, 1.5), TypeError, "radius must be an integer"),
    (lambda: hamming_topk(BITS, BITS, 1, mask=MASK[1:]), ValueError, "mask must have a value for each of the 50 codes"),
    (lambda: hamming_topk(BITS, BITS, 1, mask=X[:, 0]), TypeError, "mask must be bool or uint8"),
    (lambda: hamming_topk(BITS, BITS, 1, mask=N(MASK)), TypeError, "must be all NumPy arrays or all tensors"),
    (lambda: hamming_topk(BITS, BITS, 1, mask=MASK, ids=IDS[0]), ValueError, "mask and ids must not be given both"),
    (lambda: hamming_topk(BITS, BITS, 1, ids=torch.tensor([3, 3])), ValueError, "ids must be strictly ascending"),
    (lambda: hamming_topk(N(BITS), N(BITS), 1, ids=N([-1, 3])), IndexError, "row numbers of the 50 codes, got -1"),
    (lambda: hamming_topk(BITS, BITS, 1, ids=torch.tensor([3, 50])), IndexError, "row numbers of the 50 codes, got 50"),
    (lambda: hamming_topk(BITS, BITS, 1, ids=torch.tensor([3.0])), TypeError, "ids must be int64"),
    (lambda: hamming_topk(BITS[:4], BITS, 1, ranges=RANGES), ValueError, r"ranges must have shape \[4, ranges per"),
    (lambda: hamming_topk(BITS[:5], BITS, 1, ranges=RANGES + 1), IndexError, "within the 50 codes, got an end at 51"),
    (lambda: hamming_topk(BITS[:5], BITS, 1, ranges=-RANGES), IndexError, "within the 50 codes, got an end at -50"),
    (lambda: hamming_topk(BITS[:5], BITS, 1, ranges=RANGES.flip(2)), ValueError, "must not end before they begin"),
    (lambda: sdc_topk(X, SDC, 1, mask=MASK[1:]), ValueError, "mask must have a value for each of the 50 codes"),
    (lambda: sdc_encode(X, 0), ValueError, "bits must be between 1 and 8, got 0"),
    (lambda: sdc_encode(N(X), 9), ValueError, "bits must be between 1 and 8, got 9"),
    (lambda: sdc_encode(X, 2.0), TypeError, "bits must be an integer"),
    (lambda: sdc_encode(X[0], 2), ValueError, "x must have shape"),
    (lambda: sdc_encode(X[:, :0], 2), ValueError, "x must have at least one dim"),
    (lambda: sdc_encode(X.int(), 2), TypeError, "x must be bfloat16 or float16 or float32 or float64, got"),
    (lambda: sdc_encode(torch.where(X > 2, torch.nan, X), 2), ValueError, "x must be finite, got a NaN or infinity"),
    (lambda: sdc_encode(N(torch.cat([X[:9], X[:1] / 0])), 2), ValueError, "in row 9"),
    (lambda: sdc_topk(X, BITS, 1), TypeError, "codes must be SDCCodes"),
    (lambda: sdc_topk(X, SDC, 51), ValueError, "k must be between 1 and 50, got 51"),
    (lambda: sdc_topk(X, SDC, "1"), TypeError, "k must be an integer"),
    (lambda: sdc_topk(N(X), SDC, 1), TypeError, "must be all NumPy arrays or all tensors"),
    (lambda: sdc_topk(X[:, 1:], SDC, 1), ValueError, "queries must have the 40 dims of the codes, got 39"),
    (lambda: sdc_topk(X[0], SDC, 1), ValueError, "queries must have shape"),
    (lambda: sdc_topk(sdc_encode(X, 3), SDC, 1), ValueError, "2 bits and 40 dims of the codes, got 3 and 40"),
    (lambda: sdc_topk(X * torch.nan, SDC, 1), ValueError, "must be finite"),
    (lambda: SDCCodes(BITS, SDC.inverse_norms, 2, 40), ValueError, "codes must be 10 bytes wide for dim 40, got 5"),
    (lambda: SDCCodes(SDC.codes, SDC.inverse_norms[1:], 2, 40), ValueError, "inverse_norms must have one value"),
    (lambda: SDCCodes(SDC.codes, X, 2, 40), ValueError, r"inverse_norms must have shape \[rows\]"),
    (lambda: SDCCodes(SDC.codes, N(SDC.inverse_norms), 2, 40), TypeError, "must be all NumPy arrays or all tensors"),
    (lambda: SDCCodes(SDC.codes, SDC.inverse_norms, 2, 0), ValueError, "dim must be between 1 and 238609294, got 0"),
    (lambda: SDCCodes(SDC.codes, SDC.inverse_norms, 8, 33026), ValueError, "dim must be between 1 and 33025, got"),
    (lambda: rescore(X, X, IDS, 10), ValueError, "k must be between 1 and 9, got 10"),
    (lambda: rescore(X, X, IDS + 49, 1), IndexError, "row numbers of the 50 documents, got"),
    (lambda: rescore(N(X), N(X), N(IDS - 50), 1), IndexError, "row numbers of the 50 documents, got -50"),
    (lambda: rescore(X, X[:0], IDS, 1), IndexError, "row numbers of the 0 documents"),
    (lambda: rescore(X, X, IDS.int(), 1), TypeError, "candidate_ids must be int64"),
    (lambda: rescore(X, X, IDS[1:], 1), ValueError, "candidate_ids must have a row for each of the 50 queries, got 49"),
    (lambda: rescore(X, X[:, 1:], IDS, 1), ValueError, "documents must have the 40 dims of the queries, got 39"),
    (lambda: rescore(X, X.half(), IDS, 1), TypeError, "documents must have the dtype of the queries"),
    (lambda: rescore(X, N(X), IDS, 1), TypeError, "must be all NumPy arrays or all tensors"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_raises_one_clear_error(case: int) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_registered_ops_check_what_they_are_given() -> None:
    with pytest.raises(TypeError, match="queries must be uint8"):
        torch.ops.fastembed.hamming_topk(X, X, 1)
    with pytest.raises(ValueError, match="codes must be 15 bytes wide"):
        torch.ops.fastembed.sdc_topk(SDC.codes, SDC.inverse_norms, SDC.codes, SDC.inverse_norms, 3, 40, 1)


def test_arrays_under_another_backend_are_refused() -> None:
    with fastembed.use_backend("reference"), pytest.raises(TypeError, match="must be tensors for backend 'reference'"):
        pack_bits(N(X))
