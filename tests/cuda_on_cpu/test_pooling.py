"""csrc/pooling/pooling.cu through the whole Python path, against the reference."""

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from test_pooling import DTYPES, Call, _calls, _flat, _random
from tolerance import assert_close_to_oracle
from torch import Tensor

import fastembed
from fastembed.ops.pooling import MODES
from fastembed.reference import pooling as reference
from fastembed.reference.search import pack_bits

pytestmark = pytest.mark.usefixtures("simulated_cuda")

CHUNK = 128  # tokens that one block of reduce_chunks takes (csrc/pooling/plan.cuh)


def check(call: Call) -> None:
    ours, reference, oracle = call.ours(), call.reference(), call.oracle()
    assert [list(by_dim) for by_dim in ours] == [list(by_dim) for by_dim in reference]
    for our, same_dtype, exact in zip(_flat(ours), _flat(reference), _flat(oracle), strict=True):
        assert our.dtype == same_dtype.dtype
        assert_close_to_oracle(our, same_dtype, exact)


def mask_with_holes(batch: int, length: int) -> Tensor:
    """Left padding, right padding, holes and an empty row in turn."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        if row % 4 == 0:
            mask[row, : length // 3] = 0
        elif row % 4 == 1:
            mask[row, length - length // 3 :] = 0
        elif row % 4 == 2:
            mask[row, ::3] = 0
        else:
            mask[row] = 0
    return mask


@settings(max_examples=25)
@given(call=_calls())
def test_agrees_with_the_reference(thread_order: str, call: Call) -> None:
    check(call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded(thread_order: str, mode: str, dtype: torch.dtype) -> None:
    """Several chunks and tiles; a width that vectors do not divide."""
    mask = mask_with_holes(4, CHUNK + 40)
    hidden = _random((4, CHUNK + 40, 301), 0, dtype)
    hidden[mask == 0] = math.nan
    check(Call([hidden, hidden[..., :264]], {"attention_mask": mask, "mode": mode, "dims": [[300, 7, 264], [64]]}))


@pytest.mark.parametrize(
    ("mode", "dtype"), [("max", torch.float32), ("lasttoken", torch.float16), ("weightedmean", torch.float16)]
)
def test_sanitized(mode: str, dtype: torch.dtype) -> None:
    """Small, for the runs under sanitizers: two chunks, a narrow exit, a vectorised and an odd width, wrong offsets."""
    mask = mask_with_holes(2, CHUNK + 5)
    hidden = _random((2, CHUNK + 5, 40), 7, dtype)
    check(Call([hidden, hidden[..., :3]], {"attention_mask": mask, "mode": mode, "dims": [[8, 40], [3]]}))
    check(Call([hidden[0]], {"cu_seqlens": torch.tensor([0, 2, CHUNK + 5]), "mode": mode, "dims": [37]}))
    fastembed.pool_exits([hidden[0]], cu_seqlens=torch.tensor([9, -(2**40), 2**40, 3]), mode=mode)


@pytest.mark.parametrize("mode", ["mean", "max", "cls"])
def test_int8_and_packed_bits(mode: str) -> None:
    """Exactly the codes of the vectors that the same kernels pool."""
    hidden = _random((5, 6, 43), 8)
    hidden[1], hidden[2, 0, 20], hidden[3, 0, 3] = 0, math.nan, math.inf
    dims = [43, 8, 21]
    pooled = fastembed.pool_exits([hidden], mode=mode, normalize=False)[0][43]
    int8 = fastembed.pool_exits([hidden], mode=mode, dims=dims, out_dtype=torch.int8)[0]
    bits = fastembed.pool_exits([hidden], mode=mode, dims=dims, out_dtype=torch.uint8)[0]
    for dim in dims:
        assert torch.equal(int8[dim], reference.to_int8(pooled[:, :dim]))
        assert torch.equal(bits[dim], pack_bits(pooled[:, :dim]))


@pytest.mark.parametrize("mode", MODES)
def test_packed(thread_order: str, mode: str) -> None:
    """Sequences that begin and end on, before and after the edges of chunks; empty ones between them."""
    lengths = [0, CHUNK, 1, 0, 0, CHUNK - 1, 2 * CHUNK + 1, 3, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    hidden = _random((int(offsets[-1]), 40), 1)
    check(Call([hidden], {"cu_seqlens": offsets, "mode": mode, "dims": [8, 40]}))


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken"])
def test_lengths(length: int, mode: str) -> None:
    check(Call([_random((2, length, 16), 2)], {"mode": mode}))


def test_more_exits_and_dims_than_one_launch_takes() -> None:
    hidden_states = [_random((2, 9, 150), seed) for seed in range(18)]
    every_dim = list(range(150, 0, -1))
    check(Call(hidden_states, {"dims": [every_dim, *([[5, 150]] * 17)]}))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_unaligned_tensors(shift: int) -> None:
    hidden = _random((2, 20, 67), 3, torch.float16)[..., shift : shift + 64]
    check(Call([hidden], {"dims": [64, 24]}))


def test_a_row_does_not_depend_on_the_others() -> None:
    hidden = _random((5, 200, 96), 4, torch.bfloat16)
    mask = mask_with_holes(5, 200)
    whole = fastembed.pool_exits([hidden], mask, dims=[96])[0][96]
    for row in range(5):
        alone = fastembed.pool_exits([hidden[row : row + 1]], mask[row : row + 1], dims=[96])[0][96]
        assert torch.equal(alone[0], whole[row])


def test_thread_order_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = _random((2, 300, 96), 5)
    results = []
    for order in ("asc", "desc", "random"):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        results.append(fastembed.pool_exits([hidden], dims=[96])[0][96])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "offsets",
    [[5, 3, 1, 0], [0, 400, 10, 20], [-7, -1, 10**12, 2**62], [300, 300, 300, 300], [0, 0, 0, 0], [250, 0, 250, 0]],
)
@pytest.mark.parametrize("mode", MODES)
def test_wrong_offsets_stay_inside_the_tensors(offsets: list[int], mode: str) -> None:
    """The kernels cannot raise, so they clamp; the sanitized run of this test sees every access."""
    hidden = _random((300, 24), 6)
    pooled = fastembed.pool_exits([hidden], cu_seqlens=torch.tensor(offsets), mode=mode, dims=[24])[0][24]
    assert pooled.shape == (3, 24)


def test_launch_errors_are_raised(simulated_module: ModuleType) -> None:
    too_many = 2**31
    with pytest.raises(RuntimeError, match="more than one launch takes"):
        simulated_module.pool_exits([(0, 1, 1, [(1, 0)])], too_many, 1, None, None, 0, 0, 0, True, [], 0, 0)
