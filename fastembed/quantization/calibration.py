"""Running a model on calibration data while watching its layers, and leaving it as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations import surgery
from ..integrations.batches import Tokenizer
from ..integrations.libraries import is_pipeline

# Texts that run together. What measuring keeps of one batch is like training's memory for it.
BATCH = 8
# Texts of the Python standard library that stand in where none are given: so many descriptions, so much source.
_DEFAULT_TEXTS = 32

# In the order in which they are looked for in a model's output.
_EMBEDDINGS = ("sentence_embedding", "last_hidden_state", "pooler_output", "logits")


@dataclass(frozen=True)
class Calibration:
    """A model and batches of its inputs: all of them, or every so many from the first on.

    Iterate `run` to see each batch's output; hooks on the model see the layers meanwhile.
    """

    model: nn.Module
    batches: Sequence[Any]
    first: int = 0
    step: int = 1

    def run(self, gradients: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each batch's (embeddings, mask of its valid tokens or None), in evaluation mode.

        Raises:
            ValueError: an embedding is not finite, or a batch has none.
        """
        with surgery.evaluating(self.model):
            for number in range(self.first, len(self.batches), self.step):
                batch = self.batches[number]
                with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                    output = _embeddings_of(self._call(batch))
                if not output.numel():
                    raise ValueError(f"calibration must have rows in every batch, got none in batch {number}")
                if not bool(output.detach().isfinite().all()):
                    raise ValueError(
                        f"calibration must give finite outputs, got NaN or infinite ones from batch {number}; "
                        "the model is left as it was"
                    )
                yield output, mask_of(batch)

    def halves(self) -> tuple["Calibration", "Calibration"]:
        """Every second batch, and the others; of a single one both have all."""
        if len(self.batches) == 1:
            return self, self
        return replace(self, step=2), replace(self, first=1, step=2)

    def _call(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self.model(dict(batch)) if is_pipeline(self.model) else self.model(**batch)
        return self.model(*batch) if isinstance(batch, tuple | list) else self.model(batch)


def prepare(model: nn.Module, data: Any, tokenizer: Any = None) -> Calibration:
    """Calibration data for a model.

    Args:
        model: what will be run.
        data: texts, or pairs of texts for a cross-encoder; or batches that the model takes: dicts, tuples or tensors.
            None: texts of the Python standard library that runs this, if the model can tokenise them.
        tokenizer: a transformers tokenizer, for texts where the model has none of its own.

    Raises:
        TypeError: `data` is one text, or no collection, or holds something else than all texts or all batches.
        ValueError: it is empty, or texts for a model without a tokenizer.
    """
    if isinstance(data, str | Mapping | Tensor) or not isinstance(data, Iterable | None):
        raise TypeError(f"calibration must be a list of texts or of batches, got {type(data).__name__}")
    if data is None:
        if not is_pipeline(model) and tokenizer is None:
            raise ValueError("calibration must be given, as texts with tokenizer=... or as batches, got None")
        data = _texts_of_the_standard_library()
    data = list(data)
    if not data:
        raise ValueError("calibration must have at least one text or batch, got none")
    if all(_is_text(item) for item in data):
        return Calibration(model, list(_tokenised(model, data, tokenizer)))
    for number, item in enumerate(data):
        if not isinstance(item, Mapping | tuple | list | Tensor):
            raise TypeError(
                "calibration must hold texts only, or batches (dicts, tuples or tensors) only, got "
                f"{type(item).__name__} at {number}"
            )
    return Calibration(model, data)


def mask_of(batch: Any) -> Tensor | None:
    """Which tokens of a batch are valid: bool [rows, tokens], or None where it does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def tokens_of(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states [..., features] as rows [tokens, features], without padding where the mask is of their shape."""
    hidden = hidden.detach()
    if mask is not None and hidden.shape[:-1] == mask.shape:
        return hidden[mask]
    return hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None]


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer or block was called on: its first argument, whatever its name."""
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))


@contextmanager
def hooks(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook, called with (module, args, kwargs, output), on every module inside the `with` block."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_text(item: Any) -> bool:
    """Whether an item is a text or a pair of texts."""
    is_pair = isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(text, str) for text in item)
    return isinstance(item, str) or is_pair


def _length(item: str | Sequence[str]) -> int:
    return len(item) if isinstance(item, str) else sum(map(len, item))


def _tokenised(model: nn.Module, texts: Sequence[str | Sequence[str]], tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    """Batches of texts of about one length, longest first."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ordered = sorted(texts, key=_length, reverse=True)
    if not is_pipeline(model) and tokenizer is None:
        raise ValueError(
            "calibration with texts needs tokenizer=... where the model is no SentenceTransformer, got None"
        )
    encode = None if tokenizer is None else Tokenizer(tokenizer, None)
    for start in range(0, len(ordered), BATCH):
        piece = ordered[start : start + BATCH]
        if encode is not None:
            yield encode.pad(encode(piece), device)
        else:
            features = model.preprocess(piece)  # type: ignore[operator]
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}


@cache
def _texts_of_the_standard_library() -> tuple[str, ...]:
    # Reading the whole library takes seconds.
    from ..demo.corpus import build_corpus

    pairs = build_corpus(2 * _DEFAULT_TEXTS)
    return (*(pair.query for pair in pairs[:_DEFAULT_TEXTS]), *(pair.document for pair in pairs[_DEFAULT_TEXTS:]))


def _embeddings_of(output: Any) -> Tensor:
    """What a model is used for: its sentence embeddings, else its hidden states, to unit length; else its tensor."""
    if isinstance(output, Mapping):
        for name in _EMBEDDINGS:
            if isinstance(output.get(name), Tensor):
                return nn.functional.normalize(output[name].float(), dim=-1)
        if output and all(isinstance(name, tuple) for name in output):  # a MultiExitEncoder's: every exit counts alike
            exits = [nn.functional.normalize(embedding.float(), dim=-1) for embedding in output.values()]
            return torch.cat(exits, dim=-1) / len(exits) ** 0.5
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = next((item for item in output if isinstance(item, Tensor) and item.is_floating_point()), None)
    if not isinstance(output, Tensor):
        raise ValueError(f"model must return a tensor, or a dict or tuple with one, got {type(output).__name__}")
    return output
