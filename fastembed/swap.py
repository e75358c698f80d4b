"""Put fastembed's layers into an existing model, and take them out again."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .integrations import surgery
from .integrations.activations import epilogue_of, find_epilogues
from .integrations.attention_heads import AttentionHead, find_attention_heads
from .nn import QuantLinear
from .quantization.config import QuantConfig
from .quantization.layers import find_layers
from .quantization.weights import quantize_weights
from .report import SwapReport, SwapRow, alike


@torch.inference_mode(False)  # so that gradients can flow through the layers later
def swap(
    model: nn.Module,
    quantize: QuantConfig | None = QuantConfig(),  # noqa: B008 (frozen)
    pooling: bool = True,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    keep_originals: bool = True,
    verbose: bool = True,
) -> SwapReport:
    """Replace a model's linear layers by quantised ones and its pooling by ours, in place.

    The model is used as before: `encode`, `forward`, `to`, `half`, `train`, deepcopy and pickle work, gradients reach
    everything but the quantised weights, and `state_dict` holds the quantised tensors. `save_pretrained` (and `save`,
    `push_to_hub`) write the original model, so that what is saved loads anywhere and has lost nothing.

    - Every `torch.nn.Linear` becomes a `fastembed.nn.QuantLinear`; a GELU or ReLU that takes its output and nothing
      else is computed by it. Tied layers are quantised once and stay tied. Left alone: subclasses of nn.Linear, layers
      with hooks, layers inside modules that read their weights themselves (PyTorch's own composite ones and any whose
      forward does), weights tied to something else (an embedding), and what `quantize.skip` says.
    - In sentence-transformers models, Pooling and a Normalize behind it become one pass of `fastembed.pool_exits`.
    - SigLIP's attention pooling and NV-Embed's latent attention become `fastembed.nn.LatentAttentionPooling` in floats,
      folded for inference; it shares their tensors.
    - Transformers encoders run large batches in slices that fit the processor's caches.

    Args:
        model: a SentenceTransformer, a transformers model, or any module that holds such.
        quantize: how the linear layers are quantised; None leaves them as they are.
        pooling: whether pooling is replaced.
        calibration, tokenizer: what `quantize` measures on, as `fastembed.quantize` takes them.
        keep_originals: keep the replaced modules for `unswap` and saving. They stay in memory where they are, so a
            swapped model takes more memory than before, not less: False gives them up, and with them both.
        verbose: show progress, and print the report.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model is swapped already, nothing in it can be replaced, a pattern of `quantize` fits no
            linear layer, a weight is NaN or infinite, the calibration is empty or yields NaN, or the budget is too
            small. The model is left as it was, as it is when quantising is interrupted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if quantize is not None and not isinstance(quantize, QuantConfig):
        raise TypeError(f"quantize must be a QuantConfig or None, got {type(quantize).__name__}")
    if surgery.is_changed(model):
        way_out = "call fastembed.unswap(model) first" if surgery.keeps_originals(model) else "take the original model"
        raise ValueError(f"model is swapped or quantised already: {way_out}")
    plan = _Plan(keep_originals)
    bytes_before = surgery.tensor_bytes(model)
    heads = list(find_attention_heads(model)) if pooling else []
    if quantize is not None:
        inside = {module for head in heads for module in head.original.modules()}
        _plan_linears(plan, model, quantize, inside, calibration, tokenizer, verbose)
    if pooling:
        _plan_pooling(plan, model)
        _plan_attention_heads(plan, heads)
    if not plan.rows:
        reasons = "".join(f"\n  {label}: {plan.left[names[0]]}" for label, names in alike(plan.left).items())
        raise ValueError(f"model has nothing to swap{' that may be swapped:' + reasons if reasons else ''}")
    if quantize is not None:
        _plan_encoders(plan, model)
    _plan_saving(plan, model)
    plan.carry_out()
    report = SwapReport(
        tuple(plan.rows),
        plan.left,
        bytes_before,
        surgery.tensor_bytes(model),
        surgery.original_bytes(model),
    )
    if verbose:
        print(report)
    return report


def quantize(
    model: nn.Module,
    *,
    avg_bits: float | None = None,
    bits: int | Mapping[str, int] | None = None,
    importance: str | Mapping[str, float] = "measured",
    quantizer: str | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    group_size: int = 64,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    activations: str | Mapping[str, str] = "int8",
    skip: Sequence[str] = (),
    levels: Sequence[int] | None = None,
    granularity: str = "block",
    keep_originals: bool = False,
    verbose: bool = True,
) -> SwapReport:
    """Quantise the linear layers of a model to a budget, in place: `swap` for size first.

    The layers are scored, get bit-levels within the budget, are quantised one after the other and then exchanged, all
    at once: until the last one is done the model is as it was. The same model, data and settings give the same bits.
    Save the result with `fastembed.save_quantized`.

    Args:
        model: a SentenceTransformer, a transformers model, or any module with nn.Linear layers.
        avg_bits: bits per weight on average, scales and zero points counted; layers get the levels that suit them.
        bits: instead, the same level for all layers, or {pattern: bits}. 8 if neither is given.
        importance, group_size, symmetric, scale_dtype, activations, skip, levels, granularity: as
            `fastembed.QuantConfig` takes them.
        quantizer: as there; None: "gptq" where `calibration` is given, else "mse".
        calibration: what the model is run on where it has to be (importance "measured" and "lim", quantizer "gptq"): a
            list of texts (pairs of them for a cross-encoder), or of batches that the model takes (dicts, tuples or
            tensors). None: 64 texts of the Python standard library, for models that can tokenise.
        tokenizer: a transformers tokenizer, for texts where the model is no SentenceTransformer.
        keep_originals: keep the replaced modules for `unswap`.
        verbose: show progress, and print the report.

    Returns:
        Of every layer score, level, bits per weight, bytes and reconstruction error; of the model average bits, bytes.

    Raises:
        TypeError, ValueError: as `swap`.
    """
    config = QuantConfig(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activations=activations,
        scale_dtype=scale_dtype,
        skip=skip,
        avg_bits=avg_bits,
        importance=importance,
        granularity=granularity,
        levels=levels,
        # GPTQ halves the error on texts like its own, and gains nothing on others: the standard library's do not do.
        quantizer=quantizer or ("mse" if calibration is None else "gptq"),
    )
    return swap(
        model,
        config,
        pooling=False,
        calibration=calibration,
        tokenizer=tokenizer,
        keep_originals=keep_originals,
        verbose=verbose,
    )


def unswap(model: nn.Module) -> None:
    """Undo `swap`: put the very modules back that it replaced.

    They come back on the device and in the dtype that the model has by now. Works on any model that holds swapped
    parts, whichever model `swap` was called on.

    Raises:
        ValueError: the model is not swapped, or was swapped with `keep_originals=False`.
    """
    if not surgery.is_changed(model):
        raise ValueError("model is not swapped")
    _require_originals(model, "unswap it")
    surgery.restore(model)


def plan_use(
    model: nn.Module,
    layers: Mapping[str, QuantLinear],
    absorbed: Mapping[str, str],
    pooling: bool,
    heads: Sequence[AttentionHead],
) -> "_Plan":
    """Putting layers that were quantised earlier into a model of the same architecture.

    Args:
        model: where they go.
        layers: name -> what replaces the linear layer there.
        absorbed: name of an activation -> the name beside it of the layer that computes it.
        pooling: whether to swap the pooling, too.
        heads: attention poolings to swap, too.
    """
    plan = _Plan(keep_originals=False)
    replacements = [*layers.items(), *((name, surgery.Absorbed(by=by)) for name, by in absorbed.items())]
    for path, replacement in replacements:
        parent, _, name = path.rpartition(".")
        plan.replace(model.get_submodule(parent), name, replacement)
    if pooling:
        _plan_pooling(plan, model)
    _plan_attention_heads(plan, heads)
    _plan_encoders(plan, model)
    _plan_saving(plan, model)
    return plan


@dataclass
class _Plan:
    """Everything to be done, worked out before the first change: what fails, fails while the model is untouched."""

    keep_originals: bool
    steps: list[Callable[[], None]] = field(default_factory=list)
    undoing: list[Callable[[], object]] = field(default_factory=list)
    rows: list[SwapRow] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def replace(self, parent: nn.Module, name: str, replacement: nn.Module) -> None:
        self.undoing.append(partial(parent._modules.__setitem__, name, parent._modules[name]))
        self.steps.append(lambda: surgery.replace_child(parent, name, replacement, keep=self.keep_originals))

    def override(self, module: nn.Module, name: str, function: Callable[..., Any], *bound: Any) -> None:
        self.undoing.append(partial(module.__dict__.pop, name, None))
        self.steps.append(lambda: surgery.override_method(module, name, function, *bound))

    def carry_out(self) -> None:
        try:
            for step in self.steps:
                step()
        except BaseException:  # KeyboardInterrupt above all
            for undo in self.undoing:
                undo()
            raise


def _plan_linears(
    plan: _Plan,
    model: nn.Module,
    config: QuantConfig,
    inside: Set[nn.Module],
    data: Any,
    tokenizer: Any,
    progress: bool,
) -> None:
    layers = find_layers(model, config, inside)
    plan.left.update(layers.left)
    quantized = quantize_weights(model, layers, config, data, tokenizer, progress) if layers.chosen else {}
    epilogues: dict[int, dict[str, str]] = {}
    for linear in layers.chosen:
        tied = linear.tied_to is not None
        of_weight = quantized[id(linear.tied_to or linear)]
        # A shallow copy shares the dict of tensors, so that tied layers stay tied through .to().
        layer = copy.copy(of_weight.layer) if tied else of_weight.layer
        layer.activations = config.activations_of(linear.name)
        module = linear.module
        epilogue = None
        if len(linear.places) == 1 and len(layers.owners[id(module.weight)]) == 1:
            parent, name = linear.places[0]
            if id(parent) not in epilogues:
                epilogues[id(parent)] = find_epilogues(parent)
            if (activation := epilogues[id(parent)].get(name)) is not None:
                function = parent._modules[activation]
                assert function is not None
                epilogue = layer.epilogue = epilogue_of(function)
                plan.replace(parent, activation, surgery.Absorbed(by=name))
        for parent, name in linear.places:
            plan.replace(parent, name, layer)
        plan.rows.append(
            SwapRow(
                linear.name,
                "linear" + (f" + {epilogue}" if epilogue else "") + (" (tied)" if tied else ""),
                layer.bits_per_weight,
                0 if tied else surgery.tensor_bytes(module),
                0 if tied else layer.nbytes,
                level=layer.bits,
                weights=0 if tied else module.weight.numel(),
                score=of_weight.score,
                error=of_weight.error,
            )
        )


def _plan_pooling(plan: _Plan, model: nn.Module) -> None:
    if "sentence_transformers" not in sys.modules:  # then no module of the model can be one of its
        return
    from .integrations.sentence_transformers import FusedPooling, find_poolings

    names = {id(module): name for name, module in model.named_modules()}
    for parent, name, module, normalize in find_poolings(model):
        plan.replace(parent, name, FusedPooling(module, normalize=normalize is not None))
        if normalize is not None:
            plan.replace(parent, normalize, surgery.Absorbed(by=name))
        kind = "pooling" if normalize is None else "pooling + normalize"
        plan.rows.append(SwapRow(names[id(module)], kind, None, 0, 0))


def _plan_attention_heads(plan: _Plan, heads: Sequence[AttentionHead]) -> None:
    for head in heads:
        plan.replace(head.parent, head.name, head.replacement)
        size = surgery.tensor_bytes(head.original)
        plan.rows.append(SwapRow(head.path, head.kind, None, size, size))


def _plan_encoders(plan: _Plan, model: nn.Module) -> None:
    if "transformers" not in sys.modules:
        return
    from .integrations.transformers import find_encoders, forward_in_slices

    for encoder in find_encoders(model):
        plan.override(encoder, "forward", forward_in_slices)


def _plan_saving(plan: _Plan, model: nn.Module) -> None:
    """What sentence-transformers and transformers save, on whichever level it is called, is the original model."""
    for module in model.modules():
        if hasattr(type(module), "push_to_hub"):
            for method in ("save", "save_pretrained"):
                if hasattr(type(module), method):
                    plan.override(module, method, save_original, method)


def save_original(model: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a saving method of a swapped model with the originals in place, and swap back."""
    _require_originals(model, "save it")
    with surgery.restored(model):
        return getattr(model, method)(*args, **kwargs)


def _require_originals(model: nn.Module, purpose: str) -> None:
    if not surgery.keeps_originals(model):
        raise ValueError(
            f"model was swapped with keep_originals=False: swap with keep_originals=True to {purpose}, or write the "
            "quantised model with fastembed.save_quantized"
        )
