"""LayerMix: pooled vectors of several layers, mixed."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastembed
from fastembed.nn import LayerMix
from fastembed.ops.pooling import MODES

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])


def hidden_states(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before_pooling", [False, True])
def test_a_linear_mode_of_the_mixture_is_the_mixture_of_the_poolings(mode: str, before_pooling: bool) -> None:
    """For max it is not, and `before_pooling` says which of the two is meant."""
    hidden, weights = hidden_states(), [0.5, 0.2, 0.3]
    ours = LayerMix(weights, mode=mode, before_pooling=before_pooling, normalize=False, dims=[8, 3])(hidden, MASK)
    mixture = sum(weight * h for weight, h in zip(weights, hidden, strict=True))
    if mode == "max" and not before_pooling:
        pooled = fastembed.pool_exits(hidden, MASK, mode=mode, normalize=False)
        expected = sum(weight * p[8] for weight, p in zip(weights, pooled, strict=True))
    else:
        expected = fastembed.pool_exits([mixture], MASK, mode=mode, normalize=False)[0][8]
    torch.testing.assert_close(ours[8], expected)
    torch.testing.assert_close(ours[3], expected[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_first_last_average(dtype: torch.dtype) -> None:
    first, _, last = hidden_states(dtype)
    ours = LayerMix(2)([first, last], MASK)[8]
    assert ours.dtype == dtype
    mean = [(h.double() * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True).clamp(min=1) for h in (first, last)]
    expected = normalize((mean[0] + mean[1]) / 2, dim=1)
    torch.testing.assert_close(
        ours.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


def test_packed_and_packed_bits() -> None:
    hidden = hidden_states()
    offsets = torch.tensor([0, 5, 10, 15])
    padded = LayerMix(3, out_dtype=torch.uint8)(hidden)[8]
    packed = LayerMix(3, out_dtype=torch.uint8)([h.reshape(15, 8) for h in hidden], cu_seqlens=offsets)[8]
    assert torch.equal(padded, packed)
    assert torch.equal(padded, fastembed.pack_bits(LayerMix(3)(hidden)[8]))


@pytest.mark.parametrize("before_pooling", [False, True])
@pytest.mark.parametrize("mode", ["mean", "max", ["cls", "max"]])
def test_gradcheck_of_states_weights_and_gamma(mode: str | list[str], before_pooling: bool) -> None:
    mix = LayerMix(3, trainable=True, mode=mode, before_pooling=before_pooling, normalize=False).double()
    parameters = [torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)]
    inputs = [h.requires_grad_() for h in [*hidden_states(torch.float64), *parameters]]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = {"logits": inputs[3], "gamma": inputs[4]}
        return tuple(torch.func.functional_call(mix, values, (list(inputs[:3]), MASK)).values())

    assert torch.autograd.gradcheck(run, inputs)


def test_what_is_learned_and_what_is_kept() -> None:
    fixed, learned = LayerMix([0.2, 0.8]), LayerMix([0.2, 0.8], trainable=True)
    assert list(fixed.parameters()) == []
    assert {name for name, _ in learned.named_parameters()} == {"logits", "gamma"}
    torch.testing.assert_close(learned.weights, torch.tensor([0.2, 0.8]))
    learned.load_state_dict(LayerMix([0.6, 0.4]).state_dict())
    torch.testing.assert_close(copy.deepcopy(learned).weights, torch.tensor([0.6, 0.4]))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (0, ValueError, "weights must be for at least one layer, got 0"),
        ([], ValueError, "weights must be positive and sum to 1"),
        ([0.5, 0.6], ValueError, "weights must be positive and sum to 1"),
        ([1.5, -0.5], ValueError, "weights must be positive"),
        ("half", TypeError, "weights must be a number of layers or a list of numbers"),
    ],
)
def test_bad_weights(weights: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LayerMix(weights)


def test_bad_hidden_states() -> None:
    with pytest.raises(ValueError, match="hidden_states must be as many as the weights, 2, got 3"):
        LayerMix(2)(hidden_states())
    with pytest.raises(ValueError, match=r"hidden_states must be of one shape to be mixed, got \(3, 8\), \(3, 4\)"):
        LayerMix(2)([hidden_states()[0], hidden_states()[1][..., :4]])
    with pytest.raises(ValueError, match="mode must be one of"):
        LayerMix(2, mode="median")
