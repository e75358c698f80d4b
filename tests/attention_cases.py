"""Inputs of latent_attention, and the comparison of results and gradients with PyTorch's."""

from dataclasses import dataclass, replace

import torch
from tolerance import assert_close_to_oracle
from torch import Tensor
from torch.nn import functional as F

from fastembed.ops.latent_attention import latent_attention
from fastembed.reference import latent as reference

# Queries, keys, features and value features; with an odd number of queries the case is masked.
SIZES = ((1, 300, 20, 20), (5, 17, 1, 33), (70, 2, 70, 3), (71, 270, 20, 17))


@dataclass(frozen=True)
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None
    grad: Tensor
    scale: float

    def out_and_gradients(self) -> tuple[Tensor, ...]:
        """By the backend in use, through autograd."""
        return self._through_autograd(lambda q, k, v: latent_attention(q, k, v, self.keep, scale=self.scale))

    def by_the_definition(self) -> tuple[Tensor, ...]:
        return self._through_autograd(lambda q, k, v: reference.attention(q, k, v, self.keep, self.scale)[0])

    def _through_autograd(self, attend: object) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_(True) for x in (self.query, self.key, self.value)]
        out = attend(*inputs)  # type: ignore[operator]
        return out.detach(), *torch.autograd.grad(out, inputs, self.grad)

    def double(self) -> "Case":
        return replace(self, **{name: getattr(self, name).double() for name in ("query", "key", "value", "grad")})

    def row(self, index: int) -> "Case":
        tensors = ("query", "key", "value", "keep", "grad")
        return replace(self, **{name: getattr(self, name)[index : index + 1] for name in tensors})

    def padded(self, left: int, right: int) -> "Case":
        """With so many more keys on either side, which are NaN and nobody keeps."""
        key, value = (F.pad(x, (0, 0, left, right), value=float("nan")) for x in (self.key, self.value))
        keep = self.keep if self.keep is not None else torch.ones(len(key), self.key.shape[2], dtype=torch.bool)
        return replace(self, key=key, value=value, keep=F.pad(keep, (left, right)))


def make_case(
    batch: int, queries: int, keys: int, features: int, value_features: int, masked: bool, dtype: torch.dtype
) -> Case:
    """Two heads. Masked: the first row has no key, the others some; what is masked is NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, 2, *shape, generator=generator).to(dtype)

    query, key, value = normal(queries, features), normal(keys, features), normal(keys, value_features)
    keep = None
    if masked:
        keep = torch.rand(batch, keys, generator=generator) < 0.6
        keep[0] = False
        for x in (key, value):
            x.masked_fill_(~keep[:, None, :, None], float("nan"))
    return Case(query, key, value, keep, normal(queries, value_features), features**-0.5)


def assert_as_good_as_pytorch(case: Case) -> None:
    ours, theirs, oracle = case.out_and_gradients(), case.by_the_definition(), case.double().by_the_definition()
    for our, their, exact, factor in zip(ours, theirs, oracle, (2, 3, 3, 3), strict=True):
        assert our.dtype == case.query.dtype
        assert_close_to_oracle(our, their, exact, factor=factor)


def assert_padding_does_not_show(case: Case, left: int, right: int) -> None:
    """Bit for bit, in the result and in the gradients, also where the padding fills blocks of its own."""
    keys = case.key.shape[2]
    out, query_grad, *of_keys = case.padded(left, right).out_and_gradients()
    expected = case.out_and_gradients()
    assert torch.equal(out, expected[0])
    assert torch.equal(query_grad, expected[1])
    for ours, theirs in zip(of_keys, expected[2:], strict=True):
        assert torch.equal(ours[:, :, left : left + keys], theirs)
        assert not ours[:, :, :left].any()
        assert not ours[:, :, left + keys :].any()
