"""NV-Embed's checkpoint: the released names of the tensors, and ours."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..._checks import check_integer

_PREFIX = "latent_attention_model."
_ATTEND, _FEED = "cross_attend_blocks.0", "cross_attend_blocks.1"
_KEYS_VALUES = f"{_ATTEND}.fn.to_kv.weight"

# Ours by the released name, in which keys and values are one.
_OURS = {
    "latents": "latents",
    f"{_ATTEND}.norm.weight": "layers.0.norm_q.weight",
    f"{_ATTEND}.norm.bias": "layers.0.norm_q.bias",
    f"{_ATTEND}.norm_context.weight": "layers.0.norm_kv.weight",
    f"{_ATTEND}.norm_context.bias": "layers.0.norm_kv.bias",
    f"{_ATTEND}.fn.to_q.weight": "layers.0.to_q.weight",
    f"{_ATTEND}.fn.to_out.weight": "layers.0.to_out.weight",
    f"{_FEED}.norm.weight": "layers.0.norm_ffn.weight",
    f"{_FEED}.norm.bias": "layers.0.norm_ffn.bias",
    f"{_FEED}.fn.net.0.weight": "layers.0.ffn_in.weight",
    f"{_FEED}.fn.net.0.bias": "layers.0.ffn_in.bias",
    f"{_FEED}.fn.net.2.weight": "layers.0.ffn_out.weight",
    f"{_FEED}.fn.net.2.bias": "layers.0.ffn_out.bias",
}
_LAYOUT = dict.fromkeys((name for name in _OURS if ".norm" in name), ("dim",)) | {
    "latents": ("latents", "dim"),
    f"{_ATTEND}.fn.to_q.weight": ("inner", "dim"),
    _KEYS_VALUES: ("2 inner", "dim"),
    f"{_ATTEND}.fn.to_out.weight": ("dim", "inner"),
    f"{_FEED}.fn.net.0.weight": ("2 hidden", "dim"),
    f"{_FEED}.fn.net.0.bias": ("2 hidden",),
    f"{_FEED}.fn.net.2.weight": ("dim", "hidden"),
    f"{_FEED}.fn.net.2.bias": ("dim",),
}


def read_checkpoint(state_dict: Mapping[str, Tensor], heads: int) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes ("dim", "latents", "inner", "hidden") and tensors by our names; see LatentAttentionPooling.from_nv_embed.

    Raises:
        TypeError, ValueError: as from_nv_embed.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors by name, got {type(state_dict).__name__}")
    check_integer("heads", heads, 1)
    whole = any(name.startswith(_PREFIX) for name in state_dict)
    tensors = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in state_dict.items()
        if name.startswith(_PREFIX) or not whole
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict must be a dict of tensors by name, got {type(tensor).__name__} as {name}")
    present = {name: tensors[name] for name in _LAYOUT if name in tensors}
    sizes = _most_common_sizes(present)
    problems = [f"{name} is missing" for name in _LAYOUT if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in _LAYOUT]
    problems += _wrong_tensors(present, sizes)
    if not problems and sizes["inner"] % heads:
        problems.append(f"{heads} heads do not divide the {sizes['inner']} rows of {_ATTEND}.fn.to_q.weight")
    if problems:
        raise ValueError("state_dict is not an NV-Embed latent attention: " + "; ".join(problems))
    key, value = tensors[_KEYS_VALUES].chunk(2)
    ours = {name: tensors[released] for released, name in _OURS.items()}
    return sizes, ours | {"layers.0.to_k.weight": key, "layers.0.to_v.weight": value}


def _wrong_tensors(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with shapes and dtypes."""
    problems = []
    dtype = Counter(tensor.dtype for tensor in tensors.values()).most_common(1)[0][0] if tensors else torch.float32
    for name, tensor in tensors.items():
        shape = [sizes.get(axis, axis) for axis in _LAYOUT[name]]
        if list(tensor.shape) != shape:
            problems.append(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            problems.append(f"{name} must be floating point, got {tensor.dtype}")
        elif tensor.dtype != dtype:
            problems.append(f"{name} must be {dtype} as the others are, got {tensor.dtype}")
    return problems


def _most_common_sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How long the axes are, by name, according to most of the tensors; of "2 hidden" also half of it, "hidden"."""
    votes: dict[str, Counter[int]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == len(_LAYOUT[name]):
            for axis, size in zip(_LAYOUT[name], tensor.shape, strict=True):
                factor, _, of = axis.rpartition(" ")
                votes.setdefault(of, Counter())[size // int(factor or 1)] += 1
    sizes = {axis: counts.most_common(1)[0][0] for axis, counts in votes.items()}
    return sizes | {f"2 {axis}": 2 * size for axis, size in sizes.items()}
