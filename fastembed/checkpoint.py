"""Quantised models as folders: safetensors for the tensors, JSON for everything else, no pickle."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from ._atomic import replacing
from ._safetensors import open_safetensors, write_safetensors
from .integrations import surgery
from .integrations.attention_heads import AttentionHead, find_attention_heads, replaced_heads
from .integrations.libraries import library_of
from .integrations.skeletons import build_skeleton, write_skeleton
from .nn import QuantLinear
from .swap import plan_use

FORMAT = "fastembed-quantized"
VERSION = 1
_SETTINGS_FILE = "fastembed.json"
_TENSORS_FILE = "quantized.safetensors"
# What the settings hold: name, type, and type of the values.
_ENTRIES: tuple[tuple[str, type, Any], ...] = (
    ("library", str, None),
    ("class", str, None),
    ("layers", dict, dict),
    ("absorbed", dict, str),
    ("tied", dict, str),
    ("pooling", bool, None),
    ("heads", dict, (int, NoneType)),
)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantised model to a folder, for `load_quantized`.

    The folder holds all parameters and buffers in `quantized.safetensors`, tied ones once; the settings of the
    quantised layers and the version of the format in `fastembed.json`; and what the model's own library needs to build
    it anew, configuration and tokenizer, without the original weights.

    Args:
        model: a SentenceTransformer, a transformers model or any module that `fastembed.quantize` has been called on.
        path: a folder; made if it is not there.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing in it is quantised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    places = dict(model.named_modules(remove_duplicate=False))
    layers = {name: _settings_of(module) for name, module in places.items() if isinstance(module, QuantLinear)}
    absorbed = {name: module.by for name, module in places.items() if isinstance(module, surgery.Absorbed)}
    if not layers:
        raise ValueError("model must have quantised layers: call fastembed.quantize(model, ...) first")
    poolings = {name for name, module in places.items() if type(module).__name__ == "FusedPooling"}
    if poolings:  # files hold the modules that they replaced; loading replaces these anew
        absorbed = {name: by for name, by in absorbed.items() if surgery.sibling(name, by) not in poolings}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    library = library_of(model)
    write_skeleton(model, library, folder, poolings)
    first: dict[int, str] = {}
    tied, tensors = {}, {}
    for name, tensor in _tensors_of(model):
        if (other := first.setdefault(id(tensor), name)) != name:
            tied[name] = other
        else:
            tensors[name] = tensor
    # A folder without settings is not mistaken for a whole one, nor old settings for those of new tensors.
    (folder / _SETTINGS_FILE).unlink(missing_ok=True)
    write_safetensors(folder / _TENSORS_FILE, tensors, {"format": FORMAT, "version": VERSION})
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "library": library,
        "class": type(model).__name__,
        "layers": layers,
        "absorbed": absorbed,
        "pooling": bool(poolings),
        "heads": {name: pooling.ffn_bits for name, pooling in replaced_heads(model)},
        "tied": tied,
    }
    with replacing(folder / _SETTINGS_FILE) as file:
        file.write(json.dumps(settings, indent=1).encode())


@torch.inference_mode(False)  # so that gradients can flow through the layers later
def load_quantized(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save_quantized` wrote.

    It is built without memory for its weights, and takes its tensors straight from the memory-mapped file, which must
    stay in place while the model is used.

    Args:
        path: the folder.
        model: for modules that are neither SentenceTransformers nor transformers models: an unquantised one of the same
            architecture, on any device, to load into.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        TypeError: `model` is not a module.
        ValueError: the folder is of a newer version or no such folder at all, a file of it is damaged, `model` has
            other layers, or a tensor is missing, unknown or of the wrong shape or dtype. A `model` that was passed is
            left as it was.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    folder = Path(path)
    settings = _read_settings(folder)
    layers = {name: _empty_layer(name, entry) for name, entry in settings["layers"].items()}
    tensors = open_safetensors(folder / _TENSORS_FILE)
    if model is None:
        model = build_skeleton(settings["library"], settings["class"], folder)
    heads = _heads_of(model, settings["heads"])
    modules = _modules_of(model, heads)
    if unknown := [name for name in (*layers, *settings["absorbed"]) if name not in modules]:
        raise ValueError(f"model must have the layers of the file, but has no {unknown[0]}")
    for name, layer in layers.items():
        _check_replaced(name, modules[name], layer)
    tied = settings["tied"]
    _check_tensors(modules, layers, tensors, tied, settings["absorbed"])
    plan = plan_use(model, layers, settings["absorbed"], settings["pooling"], heads)
    plan.carry_out()
    given: dict[str, Tensor] = {}
    for name, old in list(_tensors_of(model)):
        source = tied.get(name, name)
        if source not in given:
            tensor = tensors[source]
            given[source] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, given[source])
    return model.eval()


def _heads_of(model: nn.Module, names: Mapping[str, int | None]) -> list[AttentionHead]:
    """The heads of these names, with the bits of their poolings' feed-forwards."""
    found = {head.path: head for head in find_attention_heads(model)} if names else {}
    for name, bits in names.items():
        if name not in found:
            raise ValueError(f"{name} must be an attention pooling in the model, where the file has one")
        found[name].pooling.quantize(bits)
    return [found[name] for name in names]


def _modules_of(model: nn.Module, heads: Sequence[AttentionHead]) -> dict[str, nn.Module]:
    """Every module under every name, with the replacements of heads in their places."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for head in heads:
        inside = [name for name in modules if f"{name}.".startswith(f"{head.path}.")]
        for name in inside:
            del modules[name]
        modules.update(head.replacement.named_modules(prefix=head.path))
    return modules


def _settings_of(layer: QuantLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "bits": layer.bits,
        "group_size": layer.group_size,
        "symmetric": layer.symmetric,
        "activations": layer.activations,
        "epilogue": layer.epilogue,
        "scale_dtype": str(layer.scales.dtype).removeprefix("torch."),
        "fractional_zeros": layer.zeros is not None and layer.zeros.dtype != torch.uint8,
    }


def _empty_layer(name: str, settings: Mapping[str, Any]) -> QuantLinear:
    try:
        return QuantLinear(**{**settings, "scale_dtype": _DTYPES[settings["scale_dtype"]], "device": "meta"})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must have the settings of a QuantLinear in {_SETTINGS_FILE}, got {settings}"
        ) from error


def _check_replaced(name: str, module: nn.Module, layer: QuantLinear) -> None:
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{name} must be an nn.Linear in the model, where the file has one, got {type(module).__name__}"
        )
    ours, theirs = (layer.in_features, layer.out_features), (module.in_features, module.out_features)
    if ours != theirs:
        raise ValueError(
            f"{name} must have {ours[0]} in_features and {ours[1]} out_features, got {theirs} in the model"
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    """What `fastembed.json` says, once it is known to be of this format and whole."""
    refusal = f"path must be a folder that fastembed.save_quantized wrote, got {folder}"
    try:
        settings = json.loads((folder / _SETTINGS_FILE).read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(refusal) from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT or type(settings.get("version")) is not int:
        raise ValueError(refusal)
    if (version := settings["version"]) > VERSION:
        raise ValueError(f"path must have format version {VERSION} or older, got {version}: update fastembed-kernels")
    for name, kind, of in _ENTRIES:
        whole = isinstance(settings.get(name), kind)
        if not whole or (of is not None and not all(isinstance(value, of) for value in settings[name].values())):
            raise ValueError(f"{refusal}, whose {_SETTINGS_FILE} is damaged at {name!r}")
    return settings


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name, those included that a state_dict leaves out."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not name.startswith("_fastembed"):
                yield f"{prefix}.{name}" if prefix else name, tensor


def _check_tensors(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, QuantLinear],
    tensors: Mapping[str, Tensor],
    tied: Mapping[str, str],
    absorbed: Mapping[str, str],
) -> None:
    """Compare the file with what the model will hold, before anything is changed."""
    expected: dict[str, Tensor] = {}
    for name, module in modules.items():
        if name not in absorbed:
            owner = layers.get(name, module)
            for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is not None and not attribute.startswith("_fastembed"):
                    expected[f"{name}.{attribute}" if name else attribute] = tensor
    for name, tensor in expected.items():
        found = tensors.get(tied.get(name, name))
        if found is None:
            raise ValueError(f"the file must hold {name}, and it is missing")
        if found.shape != tensor.shape:
            raise ValueError(f"{name} must have shape {list(tensor.shape)}, got {list(found.shape)} in the file")
        if name.rpartition(".")[0] in layers and not name.endswith(".bias") and found.dtype != tensor.dtype:
            raise ValueError(f"{name} must be {tensor.dtype}, got {found.dtype} in the file")
    if unknown := sorted(set(tensors) - set(expected)):
        raise ValueError(f"the file must hold tensors of the model only, got {unknown[0]}")
