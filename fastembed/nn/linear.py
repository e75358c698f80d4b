"""QuantLinear: nn.Linear on packed weights of 1 to 8 bits; QuantLinearGroup: several on one input."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._large_pages import in_large_pages
from ..ops import qmatmul
from ..quantization.rtn import quantize_rtn
from ..reference.qmatmul import PANEL, QUAD, pack_codes, to_panels

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class QuantLinear(nn.Module):
    """A linear layer with weights of 1 to 8 bits in groups; a drop-in for `nn.Linear` at inference.

    Build one from a trained layer with `QuantLinear.from_linear`, or from codes that a quantiser made with
    `QuantLinear.from_codes`. The constructor makes an empty layer of the same configuration, to load a `state_dict`
    into. The state is plain tensors (`codes`, `scales`, `zeros` unless symmetric, `bias` if any) in one layout for
    every CPU, so it can be saved on one machine and loaded on another.

    Input [..., in_features] in float32, bfloat16 or float16 gives output [..., out_features] in the same dtype (under
    autocast, in autocast's). Gradients reach the input, so that a quantised backbone can sit under a trainable head;
    the weights are not trained.

    Args:
        in_features, out_features: as nn.Linear's; any size.
        bias: whether there is one.
        bits: bits per weight, 1 to 8.
        group_size: input features that share a scale, a multiple of 16; the last group may be shorter. -1: a whole row.
        symmetric: no zero points (see `fastembed.quantization.quantize_rtn`).
        activations: "int8": each token is quantised by its largest magnitude, which is fast. "float": taken as they
            are, so that the weights' error is the only one. May be set later.
        epilogue: None, "gelu" (erf), "gelu_tanh", "relu" or "silu", applied after the bias in the same pass. May be set
            later.
        scale_dtype: float16, bfloat16 or float32; casting the model leaves it alone.
        fractional_zeros: whether zero points are real numbers in the dtype of the scales instead of codes. Those of one
            bit always are.
        device: where the tensors live.

    Raises:
        TypeError, ValueError: a setting is not as above.
    """

    # There is no float weight: models that look at one first ask whether it is a tensor (T5).
    weight = None

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
        scale_dtype: torch.dtype = torch.float16,
        fractional_zeros: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        features_per_group = qmatmul.whole_row(in_features) if group_size == -1 else group_size
        qmatmul.check_configuration(bits, features_per_group, epilogue, activations)
        if scale_dtype not in SCALE_DTYPES:
            raise TypeError(f"scale_dtype must be float16, bfloat16 or float32, got {scale_dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.activations = activations
        self.epilogue = epilogue
        self._features_per_group = features_per_group
        self._layer: qmatmul.Layer | None = None
        panels = -(-out_features // PANEL)
        per_group = (panels, -(-in_features // features_per_group), PANEL)
        codes_shape = (panels, -(-in_features // QUAD), 32 * bits)
        zero_dtype = scale_dtype if fractional_zeros or bits == 1 else torch.uint8
        self.register_buffer("codes", _zeros(codes_shape, torch.uint8, device))
        self.register_buffer("scales", _zeros(per_group, scale_dtype, device))
        self.register_buffer("zeros", None if symmetric else _zeros(per_group, zero_dtype, device))
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
        scale_dtype: torch.dtype = torch.float16,
    ) -> "QuantLinear":
        """Quantise a trained layer by round-to-nearest. The layer itself is left as it is.

        Args:
            linear: an `nn.Linear` with finite weights, in any floating dtype, on any device.
            bits, group_size, symmetric, activations, epilogue, scale_dtype: as in the constructor.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            ValueError: a setting is not supported, or a weight is NaN, infinite or too large for the scales' dtype.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        # An empty layer applies the rules for the settings before any work is done.
        settings = {"bits": bits, "group_size": group_size, "activations": activations, "epilogue": epilogue}
        cls(linear.in_features, linear.out_features, scale_dtype=scale_dtype, device="meta", **settings)  # type: ignore[arg-type]
        with torch.no_grad():
            codes, scales, zeros = quantize_rtn(linear.weight, bits, group_size, symmetric, scale_dtype)
            bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls.from_codes(codes, scales, zeros, bias, **settings)  # type: ignore[arg-type]
        return layer.train(linear.training)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        activations: str = "int8",
        epilogue: str | None = None,
    ) -> "QuantLinear":
        """A layer of the weight scales * (codes - zeros), as quantisers make it.

        Args:
            codes: uint8 [out_features, in_features], 0 .. 2**bits - 1.
            scales: float16, bfloat16 or float32 [out_features, groups], groups = ceil(in_features / group_size).
            zeros: shaped as scales, uint8 or in their dtype; None: the middle code, 2**(bits - 1), or 0.5 for one bit.
            bias: [out_features] in float32, bfloat16 or float16, or None. Kept, not copied.
            bits, group_size, activations, epilogue: as in the constructor.

        Raises:
            TypeError, ValueError: a tensor is not as above, or a setting is not supported.
        """
        if codes.dtype != torch.uint8 or codes.dim() != 2:
            raise TypeError(f"codes must be uint8 [out_features, in_features], got {codes.dtype} {list(codes.shape)}")
        if scales.dtype not in SCALE_DTYPES:
            raise TypeError(f"scales must be float16, bfloat16 or float32, got {scales.dtype}")
        out_features, in_features = codes.shape
        layer = cls(
            in_features,
            out_features,
            bias is not None,
            bits=bits,
            group_size=group_size,
            symmetric=zeros is None,
            activations=activations,
            epilogue=epilogue,
            scale_dtype=scales.dtype,
            fractional_zeros=zeros is not None and zeros.dtype != torch.uint8,
            device="meta",
        )
        if codes.numel() and int(codes.max()) >> bits:
            raise ValueError(f"codes must be at most {(1 << bits) - 1} for {bits} bits, got {int(codes.max())}")
        per_group = (out_features, layer.scales.shape[1])
        for name, tensor, dtypes in (
            ("scales", scales, (scales.dtype,)),
            ("zeros", zeros, (torch.uint8, scales.dtype)),
        ):
            if tensor is None:
                continue
            if tensor.dtype not in dtypes:
                raise TypeError(f"{name} must be uint8 or {scales.dtype} like the scales, got {tensor.dtype}")
            if tensor.shape != per_group:
                raise ValueError(f"{name} must have shape {list(per_group)}, got {list(tensor.shape)}")
        if bias is not None and bias.dtype not in SCALE_DTYPES:
            raise TypeError(f"bias must be float32, bfloat16 or float16, got {bias.dtype}")
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias must have shape [{out_features}], got {list(bias.shape)}")
        if zeros is not None and bits == 1:
            zeros = zeros.to(scales.dtype)
        layer.codes = in_large_pages(pack_codes(codes, bits))
        layer.scales = in_large_pages(to_panels(scales))
        layer.zeros = None if zeros is None else in_large_pages(to_panels(zeros))
        layer.bias = None if bias is None else bias.detach()
        return layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output, plus `residual` [..., out_features] if there is one, added after the epilogue."""
        if _is_any_autocast_enabled():
            x = _as_autocast(x)
            residual = None if residual is None else _as_autocast(residual)
        # nn.Module.__getattr__ would cost as much as a small layer.
        buffers = self._buffers
        if qmatmul.runs_prepared(x, buffers["bias"], residual):
            return self._prepare().run(x, residual)
        _check_features(x, self.in_features)
        return qmatmul.qlinear(
            x,
            buffers["codes"],  # type: ignore[arg-type]
            buffers["scales"],  # type: ignore[arg-type]
            buffers["zeros"],
            buffers["bias"],
            residual,
            bits=self.bits,
            group_size=self._features_per_group,
            out_features=self.out_features,
            epilogue=self.epilogue,
            activations=self.activations,
        )

    def _prepare(self) -> qmatmul.Layer:
        """The layer's tensors as the kernels want them, checked again only when they changed."""
        buffers = self._buffers
        layer = self._layer
        if layer is not None and layer.is_of(buffers, self.epilogue, self.activations):
            return layer
        layer = qmatmul.prepare(
            self.codes,
            self.scales,
            self.zeros,
            self.bias,
            bits=self.bits,
            group_size=self._features_per_group,
            in_features=self.in_features,
            out_features=self.out_features,
            epilogue=self.epilogue,
            activations=self.activations,
        )
        self._layer = layer if layer.is_lasting else None
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layer": None}  # addresses mean nothing to a copy

    def dequantize(self) -> Tensor:
        """The float32 weight [out_features, in_features] that the codes stand for."""
        return qmatmul.dequantize_weight(
            self.codes,
            self.scales,
            self.zeros,
            bits=self.bits,
            group_size=self._features_per_group,
            out_features=self.out_features,
            in_features=self.in_features,
        )

    def get_extra_state(self) -> Tensor:
        """The settings that shapes do not tell: layers of 61 and 62 features have codes of one shape."""
        return torch.tensor(self._settings(), dtype=torch.int32, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Compared before anything is loaded."""

    def _settings(self) -> list[int]:
        return [self.in_features, self.out_features, self.bits, self._features_per_group]

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
        if self.scales.dtype != torch.float16:
            parts.append(f"scale_dtype={self.scales.dtype}")
        if self.epilogue is not None:
            parts.append(f"epilogue={self.epilogue!r}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.half() or .to(torch.bfloat16) change what the model computes in, not what the codes stand for.
        scales, zeros = self.scales, self.zeros
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
            self.zeros = None if zeros is None else zeros.to(self.scales.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *reports: Any
    ) -> None:
        # Shapes are checked for every module; of dtypes only copies are made, and these would change the weight.
        *_, error_msgs = reports
        settings = state_dict.get(f"{prefix}_extra_state")
        if settings is not None and settings.tolist() != self._settings():
            error_msgs.append(
                f"{prefix[:-1] or 'the layer'} must have [in_features, out_features, bits, features per group] "
                f"{self._settings()} in the state_dict, got {settings.tolist()}"
            )
            return
        for name in ("codes", "scales", "zeros"):
            own, loaded = self._buffers[name], state_dict.get(prefix + name)
            if own is not None and loaded is not None and own.dtype != loaded.dtype:
                error_msgs.append(f"{prefix}{name} must be {own.dtype} in the state_dict, got {loaded.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)


class QuantLinearGroup(nn.Module):
    """Several QuantLinears on one input, such as an attention's query, key and value, which is quantised once for all.

    Each keeps its own bits, groups and epilogue, and gives the output that it would give alone, bit for bit.

    Args:
        layers: QuantLinears of the same in_features. They are used, not copied.

    Raises:
        TypeError, ValueError: a layer is no QuantLinear, in_features differ, or there is no layer.
    """

    def __init__(self, layers: Iterable[QuantLinear]) -> None:
        super().__init__()
        layers = list(layers)
        for layer in layers:
            if not isinstance(layer, QuantLinear):
                raise TypeError(f"layers must be QuantLinears, got a {type(layer).__name__}")
        if len({layer.in_features for layer in layers}) != 1:
            raise ValueError(f"layers must have the same in_features, got {[layer.in_features for layer in layers]}")
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' outputs, in their order, for x [..., in_features]."""
        layers: Any = list(self.layers)
        x = _as_autocast(x)
        _check_features(x, layers[0].in_features)
        if all(qmatmul.runs_prepared(x, layer._buffers["bias"]) for layer in layers):
            return qmatmul.run_together([layer._prepare() for layer in layers], x)
        return tuple(layer(x) for layer in layers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return in_large_pages(torch.zeros(shape, dtype=dtype, device=device))


def _as_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, where autocast is on."""
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(device))
    return x


def _check_features(x: Tensor, in_features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise qmatmul.wrong_features(x, in_features)
