"""Weights that others have quantised, as QuantLinear layers: GPTQ, AWQ, HQQ, optimum-quanto and GGUF.

Nothing is quantised again: codes, scales and zero points are taken over, so a layer stands for the weight that its
source dequantises to.
"""

from typing import Any

import torch
from torch import Tensor

from ..nn import QuantLinear
from ..ops.qmatmul import GROUP_MULTIPLE
from ..reference.qmatmul import midpoint

_WORD = 32
# Columns in the order in which AWQ puts them into the nibbles of a word, lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GGUF_GROUP = 32


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int = 4,
    zero_offset: int = 1,
) -> QuantLinear:
    """A layer of a GPTQ checkpoint (AutoGPTQ's and GPTQModel's layout).

    Args:
        qweight: int32 [in_features * bits / 32, out_features]; input features from the lowest bits of a word up.
        qzeros: int32 [groups, out_features * bits / 32].
        scales: [groups, out_features].
        g_idx: group of every input feature; only consecutive groups can be taken over, the last of which may be
            shorter. None: consecutive, all of one size.
        bias: [out_features] or None.
        bits: 2, 4 or 8.
        zero_offset: what is added to the stored zero points: 1 in checkpoint_format "gptq", 0 in "gptq_v2".

    Raises:
        TypeError, ValueError: a tensor is not as above, or the groups are not consecutive ("desc_act").
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")
    _check_words(qweight, qzeros)
    codes = _fields(qweight.T, bits)
    zeros = (_fields(qzeros, bits) + zero_offset).T
    g_idx = None if g_idx is None else g_idx.cpu().long()
    group = _group_size(codes, scales.shape[0]) if g_idx is None else max(1, int((g_idx == 0).sum()))
    if g_idx is not None and not torch.equal(g_idx, torch.arange(codes.shape[1]) // group):
        raise ValueError("g_idx must number consecutive groups, got a checkpoint in activation order (desc_act)")
    return _layer(codes, scales.T, zeros, bias, bits, group)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None) -> QuantLinear:
    """A layer of an AWQ checkpoint (AutoAWQ's "gemm" version, 4 bits).

    Args:
        qweight: int32 [in_features, out_features / 8]; the nibbles of a word hold columns 0, 2, 4, 6, 1, 3, 5, 7.
        qzeros: int32 [groups, out_features / 8], packed alike.
        scales: [groups, out_features].
        bias: [out_features] or None.

    Raises:
        TypeError, ValueError: a tensor is not as above.
    """
    _check_words(qweight, qzeros)
    order = torch.argsort(torch.tensor(_AWQ_ORDER))

    def unpack(words: Tensor) -> Tensor:
        return _fields(words, 4).unflatten(1, (-1, 8))[:, :, order].flatten(1)

    codes = unpack(qweight).T
    return _layer(codes, scales.T, unpack(qzeros).T, bias, 4, _group_size(codes, scales.shape[0]))


def from_hqq(layer: Any) -> QuantLinear:
    """A layer of an `hqq.core.quantize.HQQLinear` that groups along the input features (axis=1).

    Raises:
        ValueError: it groups along the output features, or its scales or zero points are quantised themselves.
    """
    from hqq.core.quantize import Quantizer

    meta = layer.meta
    if meta["axis"] != 1:
        raise ValueError(f"layer must have groups along its input features (axis=1), got axis={meta['axis']}")
    if meta.get("quant_scale") or meta.get("quant_zero"):
        raise ValueError("layer must have plain scales and zero points, got quantised ones")
    rows, columns = meta["shape"]
    group = meta["group_size"] or columns
    packing = meta["packing"]
    codes = layer.W_q.data if packing is None else Quantizer.unpack[packing](layer.W_q.data, dtype=torch.uint8)
    codes = codes[: rows * columns // group].reshape(rows, columns)
    scales, zeros = (meta[name].reshape(rows, -1).float() for name in ("scale", "zero"))
    return _layer(codes, scales, zeros, layer.bias, meta["nbits"], group)


def from_quanto(layer: Any) -> QuantLinear:
    """A layer of a frozen `optimum.quanto.QLinear` with qint8, qint4 or qint2 weights.

    Raises:
        TypeError: its weight is not quantised to integers (not frozen, or a float8 type).
    """
    weight = layer.weight
    kind = getattr(getattr(weight, "qtype", None), "name", None)
    if kind not in ("qint8", "qint4", "qint2"):
        raise TypeError(
            f"layer must be frozen, with qint8, qint4 or qint2 weights, got {kind or type(weight).__name__}"
        )
    rows, columns = weight.shape
    if kind == "qint8":
        codes = (weight._data.to(torch.int16) + 128).reshape(rows, columns)
        scales = weight._scale.reshape(-1, 1).float().expand(rows, 1)
        return _layer(codes, scales, None, layer.bias, 8, columns)
    # Its own unpack would compile an extension first. A byte holds fields of rows that lie a number of rows apart.
    stored, bits = weight._data, weight._data.bits
    fields = [(stored._data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    codes = torch.cat(fields)[: stored.shape[0]].reshape(rows, columns)
    scales, shift = (values.reshape(rows, -1).float() for values in (weight._scale, weight._shift))
    # A shift in floats is in units of the weight.
    zeros = shift / scales if weight._shift.dtype.is_floating_point else shift
    return _layer(codes, scales, zeros, layer.bias, bits, columns // scales.shape[1])


def from_gguf(tensor: Any, bias: Tensor | None = None) -> QuantLinear:
    """A layer of a `gguf.GGUFReader`'s tensor of type Q4_0 or Q8_0.

    Args:
        tensor: with `data`, uint8 [out_features, bytes of a row], and `tensor_type`.
        bias: [out_features] or None.

    Raises:
        ValueError: it is of another type, or no matrix.
    """
    kind = tensor.tensor_type.name
    if kind not in ("Q4_0", "Q8_0"):
        raise ValueError(f"tensor must be of type Q4_0 or Q8_0, got {kind}")
    data = torch.from_numpy(tensor.data.copy())
    if data.dim() != 2:
        raise ValueError(f"tensor must be a matrix, got {data.dim()} dimensions")
    # Blocks of 32 weights: a float16 scale, then int8 codes, or nibbles of codes with zero 8: first the low ones.
    blocks = data.unflatten(1, (-1, 2 + _GGUF_GROUP * (4 if kind == "Q4_0" else 8) // 8))
    scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2)
    stored = blocks[:, :, 2:]
    # int8 codes go from two's complement to an offset of 128.
    codes = torch.cat([stored & 15, stored >> 4], dim=2) if kind == "Q4_0" else stored ^ 128
    return _layer(codes.flatten(1), scales, None, bias, 4 if kind == "Q4_0" else 8, _GGUF_GROUP)


def _layer(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> QuantLinear:
    columns = codes.shape[1]
    whole_row = group >= columns
    if not whole_row and group % GROUP_MULTIPLE:
        raise ValueError(f"group_size must be a multiple of {GROUP_MULTIPLE} or a whole row, got {group}")
    if zeros is not None and bool((zeros == midpoint(bits)).all()):
        zeros = None  # a symmetric checkpoint, which needs none
    if zeros is not None:
        is_code = not zeros.dtype.is_floating_point and int(zeros.max()) >> bits == 0
        zeros = zeros.to(torch.uint8 if is_code else scales.dtype).contiguous()
    return QuantLinear.from_codes(
        codes.to(torch.uint8).contiguous(),
        scales.contiguous(),
        zeros,
        bias,
        bits=bits,
        group_size=-1 if whole_row else group,
    )


def _check_words(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise TypeError(f"qweight and qzeros must be int32 matrices, got {tensor.dtype} {list(tensor.shape)}")


def _fields(words: Tensor, bits: int) -> Tensor:
    """The fields of each word, lowest first: int32 [rows, words * 32 / bits]."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _group_size(codes: Tensor, groups: int) -> int:
    columns = codes.shape[1]
    if groups == 0 or columns % groups:
        raise ValueError(f"scales must have a row for every group of {columns} input features, got {groups}")
    return columns // groups
