"""The folded latent-attention op: its kernels at every level against the reference, and the rules of an op."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latent_models import folded_block, in_double
from tolerance import assert_close_to_oracle

from fastembed import use_backend
from fastembed.ops.latent import TILE_TOKENS, latent_pool, pack_weight
from fastembed.reference import latent as reference


def _assert_as_good_as_pytorch(inputs: dict[str, Any]) -> None:
    ours = latent_pool(**inputs)
    theirs = reference.latent_pool(**inputs)
    oracle = reference.latent_pool(**in_double(inputs))
    low = inputs["score_weight"].dtype
    for our, their, exact in zip(ours, theirs, oracle, strict=True):
        assert our.dtype == torch.float32
        # What is multiplied is rounded to the weights' dtype, hence its tolerance.
        assert_close_to_oracle(our.to(low), their.to(low), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_level(isa: str, dtype: torch.dtype) -> None:
    _assert_as_good_as_pytorch(folded_block([5, 0, 40, 1], dtype=dtype))
    _assert_as_good_as_pytorch(folded_block([17, 16], dim=300, latents=16, heads=3, hidden=64, dtype=dtype))


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    dim=st.integers(1, 70),
    latents=st.integers(1, 20),
    heads=st.integers(1, 4),
    hidden=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape(
    lengths: list[int], dim: int, latents: int, heads: int, hidden: int, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    _assert_as_good_as_pytorch(folded_block(lengths, dim, latents, heads, hidden, dtype, x_dtype))


def test_more_tokens_than_a_tile() -> None:
    _assert_as_good_as_pytorch(folded_block([TILE_TOKENS - 30, 100, 2 * TILE_TOKENS]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    lengths = [3, TILE_TOKENS - 1, 50, 1]
    inputs = folded_block(lengths, dtype=dtype)
    together = latent_pool(**inputs)
    for row, rows in enumerate(inputs["x"].split(lengths)):
        alone = latent_pool(**{**inputs, "x": rows, "cu_seqlens": torch.tensor([0, len(rows)])})
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[row])


def test_threads_do_not_show(thread_counts: tuple[int, ...]) -> None:
    inputs = folded_block([200, 30, 100], dim=128, latents=32, heads=4, hidden=256)
    results = []
    for count in thread_counts:
        torch.set_num_threads(count)
        results.append(latent_pool(**inputs))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_panels_are_the_weights(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for gated in (False, True):
            weight = torch.randn(2 * 37, 21).to(dtype)
            packed = pack_weight(weight, gated)
            assert torch.equal(packed, reference.to_panels(weight, gated))
            assert torch.equal(reference.from_panels(packed, 74, 21, gated), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same(dtype: torch.dtype) -> None:
    inputs = folded_block([5, 9], dtype=dtype)
    weights = ("score_weight", "value_weight", "hidden_weight")
    packed = {name: pack_weight(inputs[name], gated=name == "hidden_weight") for name in weights}
    for plain, from_panels in zip(latent_pool(**inputs), latent_pool(**{**inputs, **packed}), strict=True):
        assert torch.equal(plain, from_panels)
    with use_backend("reference"):
        for plain, from_panels in zip(latent_pool(**inputs), latent_pool(**{**inputs, **packed}), strict=True):
            assert torch.equal(plain, from_panels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_token_that_is_not_finite_concerns_its_sequence_only(isa: str, bad: float, backend: str) -> None:
    inputs = folded_block([4, 6, 0, 3])
    clean = latent_pool(**inputs)
    inputs["x"][7, 2] = bad
    with use_backend(backend):
        for result, expected in zip(latent_pool(**inputs), clean, strict=True):
            assert result[1].isnan().all()
            torch.testing.assert_close(result[[0, 2, 3]], expected[[0, 2, 3]])


def test_strided_tokens() -> None:
    inputs = folded_block([4, 6])
    expected = latent_pool(**inputs)
    wide = torch.full((10, 50), float("nan"))
    wide[:, 7:27] = inputs["x"]
    for x in (wide[:, 7:27], inputs["x"].T.contiguous().T):
        assert all(map(torch.equal, latent_pool(**{**inputs, "x": x}), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = folded_block([4, 0, 6], dtype=dtype)
    torch.library.opcheck(torch.ops.fastembed.latent_pool.default, tuple(inputs.values()))
    wide = torch.randn(10, 40)[:, ::2].to(dtype)
    torch.library.opcheck(torch.ops.fastembed.latent_pool.default, tuple({**inputs, "x": wide}.values()))


def test_compiles_whole() -> None:
    inputs = folded_block([4, 6])
    compiled = torch.compile(latent_pool, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert all(map(torch.equal, compiled(**inputs), latent_pool(**inputs)))


def test_backward_is_refused() -> None:
    inputs = folded_block([4])
    inputs["x"].requires_grad_(True)
    with pytest.raises(NotImplementedError, match="latent_pool has no backward"):
        latent_pool(**inputs)[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 10, 20)}, ValueError, r"x must have shape \[tokens, dim\], got \[2, 10, 20\]"),
        ({"x": torch.zeros(10, 20, dtype=torch.int32)}, TypeError, "x must be float32, bfloat16, float16 or float64"),
        ({"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32)}, ValueError, "cu_seqlens must be int64"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "cu_seqlens must rise from 0 to the 10 tokens of x"),
        ({"cu_seqlens": torch.tensor([0, 11, 10])}, ValueError, "cu_seqlens must rise from 0 to the 10 tokens of x"),
        ({"heads": 5}, ValueError, "heads must divide the 12 elements of score_bias, got 5"),
        ({"hidden_bias": torch.zeros(3)}, ValueError, "hidden_bias must have an even number of elements, got 3"),
        ({"value_weight": torch.zeros(20, 13)}, ValueError, r"value_weight must be torch.float32 \[20, 12\], got"),
        ({"score_weight": torch.zeros(12, 20).half()}, TypeError, "score_weight must be float32 or bfloat16"),
        ({"score_bias": torch.zeros(12).bfloat16()}, ValueError, "score_bias must be one-dimensional torch.float32"),
        ({"score_bias": torch.zeros(12, device="meta")}, ValueError, "score_bias must be on cpu, where x is, got meta"),
        ({"cu_seqlens": torch.zeros(3, device="meta", dtype=torch.int64)}, ValueError, "cu_seqlens must be on cpu"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        latent_pool(**{**folded_block([4, 6]), **change})
