"""QuantLinear: nn.Linear on packed weights of 1 to 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import qmatmul
from ..quantize.rtn import SCALE_DTYPE, quantize_rtn
from ..reference.qmatmul import PANEL, QUAD, pack_codes, to_panels

ACTIVATIONS = ("int8",)


class QuantLinear(nn.Module):
    """A linear layer with weights of 1 to 8 bits in groups and int8 products; a drop-in for `nn.Linear` at inference.

    Build one from a trained layer with `QuantLinear.from_linear`. The constructor makes an empty layer of the same
    configuration, to load a `state_dict` into. The state is plain tensors (`codes`, `scales`, `zeros` unless symmetric,
    `bias` if any) in one layout for every CPU, so it can be saved on one machine and loaded on another.

    Input [..., in_features] in float32, bfloat16 or float16 gives output [..., out_features] in the same dtype (under
    autocast, in autocast's). Each token's activations are quantised to int8 by their largest magnitude. Gradients reach
    the input, so that a quantised backbone can sit under a trainable head; the weights are not trained.

    Args:
        in_features, out_features: as nn.Linear's; any size.
        bias: whether there is one.
        bits: bits per weight, 1 to 8.
        group_size: input features that share a scale, a multiple of 16; the last group may be shorter.
        symmetric: no zero points (see `fastembed.quantize.quantize_rtn`).
        activations: "int8".
        epilogue: None, "gelu" (erf), "gelu_tanh", "relu" or "silu", applied after the bias in the same pass. May be set
            later.
        device: where the tensors live.

    Raises:
        ValueError: a setting is not as above.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = False,
        activations: str = "int8",
        epilogue: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        qmatmul.check_configuration(bits, group_size, epilogue)
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations must be {' or '.join(map(repr, ACTIVATIONS))}, got {activations!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.activations = activations
        self.epilogue = epilogue
        panels = -(-out_features // PANEL)
        per_group = (panels, -(-in_features // group_size), PANEL)
        codes_shape = (panels, -(-in_features // QUAD), 32 * bits)
        self.register_buffer("codes", torch.zeros(codes_shape, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(per_group, dtype=SCALE_DTYPE, device=device))
        self.register_buffer("zeros", None if symmetric else torch.zeros(per_group, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = False,
        activations: str = "int8",
        epilogue: str | None = None,
    ) -> "QuantLinear":
        """Quantise a trained layer by round-to-nearest. The layer itself is left as it is.

        Args:
            linear: an `nn.Linear` with finite weights, in any floating dtype, on any device.
            bits, group_size, symmetric, activations, epilogue: as in the constructor.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            ValueError: a setting is not supported, or a weight is NaN, infinite or too large for float16 scales.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            activations=activations,
            epilogue=epilogue,
            device="meta",
        )
        with torch.no_grad():
            codes, scales, zeros = quantize_rtn(linear.weight, bits, group_size, symmetric)
            layer.codes = pack_codes(codes, bits)
            layer.scales = to_panels(scales)
            layer.zeros = None if zeros is None else to_panels(zeros)
            layer.bias = None if linear.bias is None else linear.bias.detach().clone()
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(device))
        if x.dim() and x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension, got {list(x.shape)}")
        # nn.Module.__getattr__ would cost as much as a small layer.
        buffers = self._buffers
        return qmatmul.qlinear(
            x,
            buffers["codes"],  # type: ignore[arg-type]
            buffers["scales"],  # type: ignore[arg-type]
            buffers["zeros"],
            buffers["bias"],
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            epilogue=self.epilogue,
        )

    def dequantize(self) -> Tensor:
        """The float32 weight [out_features, in_features] that the codes stand for."""
        return qmatmul.dequantize_weight(
            self.codes,
            self.scales,
            self.zeros,
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            in_features=self.in_features,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors: codes, scales, zero points and bias, padding included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight: codes, scales and zero points with their padding, bias excluded."""
        stored = self.nbytes - (0 if self.bias is None else self.bias.numel() * self.bias.element_size())
        return 8 * stored / max(1, self.in_features * self.out_features)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}",
            f"activations={self.activations!r}",
        ]
        if self.epilogue is not None:
            parts.append(f"epilogue={self.epilogue!r}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.half() or .to(torch.bfloat16) change what the model computes in, not what the codes stand for.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self
