"""Low-bit layers for the suites of every backend, and what they should give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastembed.ops.qmatmul import EPILOGUES, dequantize_weight, qlinear
from fastembed.reference import qmatmul as reference

ALL_BITS = tuple(range(1, 9))
ZEROS = ("none", "codes", "fractional")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Layer:
    """Arguments of `qlinear` after x."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    bits: int
    group_size: int
    out_features: int
    epilogue: str | None = None
    activations: str = "int8"

    def __call__(self, x: Tensor, **changes: object) -> Tensor:
        return qlinear(x, **{**self.__dict__, **changes})

    def positional(self) -> tuple[object, ...]:
        return tuple(self.__dict__.values())


def make_layer(
    in_features: int,
    out_features: int,
    bits: int = 4,
    group_size: int = 64,
    *,
    symmetric: bool = False,
    fractional: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    bias: torch.dtype | None = torch.float32,
    epilogue: str | None = None,
    activations: str = "int8",
    seed: int = 0,
) -> Layer:
    """Random codes over their whole range, so that every bit of every code matters."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)

    scales = (torch.rand(out_features, groups, generator=generator) + 0.5) / (1 << bits)
    zeros = integers(out_features, groups)
    if fractional:
        zeros = ((torch.rand(out_features, groups, generator=generator) * 1.5 - 0.25) * (1 << bits)).to(scale_dtype)
    return Layer(
        reference.pack_codes(integers(out_features, in_features), bits),
        reference.to_panels(scales.to(scale_dtype)),
        None if symmetric else reference.to_panels(zeros),
        None if bias is None else torch.randn(out_features, generator=generator).to(bias),
        None,
        bits,
        group_size,
        out_features,
        epilogue,
        activations,
    )


def layer_of(zeros: str, *arguments: int, **options: object) -> Layer:
    """The same by the kind of its zeros, one of ZEROS."""
    return make_layer(*arguments, symmetric=zeros == "none", fractional=zeros == "fractional", **options)


@st.composite
def layers_and_inputs(
    draw: st.DrawFn,
    in_features: Sequence[int],
    out_features: Sequence[int],
    rows: Sequence[int],
    group_sizes: Sequence[int],
) -> tuple[Layer, Tensor]:
    """A layer with one of these sizes and anything else that a layer can have, and an x for it."""
    features, outputs, tokens = (draw(st.sampled_from(sizes)) for sizes in (in_features, out_features, rows))
    dtype = draw(st.sampled_from(DTYPES))
    layer = layer_of(
        draw(st.sampled_from(ZEROS)),
        *(features, outputs, draw(st.sampled_from(ALL_BITS)), draw(st.sampled_from(group_sizes))),
        scale_dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.sampled_from((None, *DTYPES))),
        epilogue=draw(st.sampled_from(EPILOGUES)),
    )
    layer.residual = random_x(tokens, outputs, dtype=dtype, seed=3) if draw(st.booleans()) else None
    return layer, random_x(tokens, features, dtype=dtype)


def oracle(layer: Layer, x: Tensor) -> Tensor:
    """The definition in float64, from the very int8 activations if that is what they are."""
    in_features = x.shape[-1]
    rows = x.reshape(-1, in_features)
    activations, token_scales = reference.quantize_activations(rows)
    rows = activations.double() * token_scales.double() if layer.activations == "int8" else rows.double()
    weight = dequantize_weight(
        layer.codes,
        layer.scales,
        layer.zeros,
        bits=layer.bits,
        group_size=layer.group_size,
        out_features=layer.out_features,
        in_features=in_features,
    )
    y = rows @ weight.double().T
    if layer.bias is not None:
        y = y + layer.bias.double()
    y = reference.apply_epilogue(y, layer.epilogue).reshape(*x.shape[:-1], layer.out_features)
    return y if layer.residual is None else y + layer.residual.double()


def random_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
