"""Token prepending: decoders that embed a text as if its last token had come first, without training."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_integer
from .encoder import MultiExitEncoder
from .integrations.backbones import Backbone, find_backbone
from .integrations.libraries import is_sentence_transformer


@contextmanager
def prepend_token(
    model: nn.Module,
    token_id: int,
    *,
    start: int = 1,
    exit: int = 7,
    output_layer: int = -2,
    embedding: Tensor | None = None,
    tokenizer: Any = None,
    normalize: bool = True,
    layers: str | None = None,
) -> Iterator[MultiExitEncoder]:
    """Let every token of a causal model see what the sentence comes to, while inside the `with` block.

    A placeholder token stands before the sentence. In front of each of the layers start, ..., exit - 1 its hidden state
    is overwritten by that of the last token, which has read the whole sentence; tokens in between attend to it. The
    embedding is the last token's, best taken a few layers before the end.

        prompt = 'This sentence : <PST> "{}" means in one word:"'
        with fastembed.prepend_token(model, tokenizer.convert_tokens_to_ids("<PST>"), tokenizer=tokenizer) as encoder:
            (embeddings,) = encoder.encode([prompt.format(text) for text in texts]).values()

    It acts on every forward pass of the model, whoever makes it (this encoder, another MultiExitEncoder, the model
    itself), in the thread that entered the block, and leaves nothing behind. Padding may stand left or right; the last
    token is the last valid one. Not for generation: a pass reads whole texts.

    Args:
        model: a transformers decoder (Llama, Qwen, Mistral, Gemma, ...), or a SentenceTransformer around one.
        token_id: the placeholder, which every text has once. Without `embedding`, a token of the vocabulary.
        start, exit: the layers, counted from 0. The paper's are 1 and 7 for Llama 2, 3 for Llama 3, 6 for Qwen 2 and
            Gemma 2.
        output_layer: whose hidden states the yielded encoder takes, as an index into `hidden_states`, 0 the embeddings
            and -1 the last layer. The paper's are 27 of 32 layers for Llama 2 7B, -2 for others.
        embedding: [hidden_size], the placeholder's input embedding; for a token outside the vocabulary, such as one
            that was added to the tokenizer alone. The paper draws it from a normal distribution.
        tokenizer: for the encoder's `encode`; a SentenceTransformer's own by default.
        normalize: whether the encoder's embeddings are L2-normalised.
        layers: where the list of layers stands in the model, if it is not found by itself.

    Yields:
        A `MultiExitEncoder` with the one exit (output_layer, hidden_size), which pools the last token.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: layers out of range; a token outside the vocabulary without an embedding; an embedding of another
            size; a model whose layers or token embeddings are not found. During a forward pass: a text without the
            placeholder or with several, no token ids, an attention mask that is not [B, T].

    Source: Token Prepending, ACL 2025, arXiv 2412.11556.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if is_sentence_transformer(model):
        pipeline: Any = model
        tokenizer = pipeline.tokenizer if tokenizer is None else tokenizer
        model = pipeline[0].auto_model
    backbone = find_backbone(model, layers)
    if backbone.shares_layers:
        raise ValueError(f"model must be a decoder, whose layers run once each, got {type(backbone.model).__name__}")
    depth = len(backbone.layers)
    for name, value, smallest, largest in (
        ("start", start, 0, depth - 1),
        ("exit", exit, 1, depth),
        ("output_layer", output_layer, -depth - 1, depth),
    ):
        check_integer(name, value, smallest, largest)
    if start >= exit:
        raise ValueError(f"start must be below exit, got {start} and {exit}")
    table = _token_embeddings(backbone)
    check_integer("token_id", token_id, 0, None if embedding is not None else table.weight.shape[0] - 1)
    if embedding is not None:
        if not isinstance(embedding, Tensor):
            raise TypeError(f"embedding must be a tensor, got {type(embedding).__name__}")
        if tuple(embedding.shape) != (backbone.hidden_size,):
            raise ValueError(f"embedding must be [{backbone.hidden_size}], got shape {list(embedding.shape)}")
    output_layer %= depth + 1
    encoder = MultiExitEncoder(
        model,
        [(output_layer, backbone.hidden_size)],
        tokenizer=tokenizer,
        mode="lasttoken",
        normalize=normalize,
        layers=layers,
    )
    prepending = _Prepending(int(token_id), embedding)
    owner = backbone.model.get_submodule(backbone.path.rpartition(".")[0])
    with ExitStack() as hooks:
        for handle in (
            owner.register_forward_pre_hook(prepending.see_mask, with_kwargs=True),
            table.register_forward_pre_hook(prepending.see_tokens),
            table.register_forward_hook(prepending.embed),
            *(
                layer.register_forward_pre_hook(prepending.overwrite, with_kwargs=True)
                for layer in backbone.layers[start:exit]
            ),
        ):
            hooks.callback(handle.remove)
        yield encoder


def _token_embeddings(backbone: Backbone) -> Any:
    model: Any = backbone.model
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(getattr(table, "weight", None), Tensor):
        raise ValueError(f"model must have token embeddings (get_input_embeddings), and {type(model).__name__} has not")
    return table


class _Prepending:
    """The hooks, and what they know of the forward pass that is under way: whose thread this is, and which tokens."""

    def __init__(self, token_id: int, embedding: Tensor | None) -> None:
        self.token_id = token_id
        self.embedding = embedding
        self._owner = threading.get_ident()
        self._mask: Tensor | None = None
        self._placeholders: Tensor | None = None  # [B, T], where they stand
        self._positions: tuple[Tensor, Tensor] | None = None  # [B] each, of the placeholder and of the last token

    def see_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_foreign():
            return
        arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = arguments.get("attention_mask", arguments.get("kwargs", {}).get("attention_mask"))
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask must be [B, T] for token prepending, got {got}")
        self._mask, self._placeholders, self._positions = mask, None, None

    def see_tokens(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._is_foreign() or not args:
            return None
        ids = args[0]
        self._placeholders = ids == self.token_id
        self._positions = self._find(self._placeholders)
        # A placeholder outside the vocabulary is looked up as any token, and then replaced.
        return (ids.masked_fill(self._placeholders, 0), *args[1:]) if self.embedding is not None else None

    def embed(self, table: Any, _: Any, output: Tensor) -> Tensor | None:
        if self._is_foreign() or self.embedding is None or self._placeholders is None:
            return None
        row = self.embedding.to(output) * getattr(table, "embed_scale", 1.0)
        return torch.where(self._placeholders[..., None], row.to(output.dtype), output)

    def overwrite(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_foreign():
            return None
        if self._positions is None:
            raise ValueError("input_ids must be given for token prepending, got embeddings")
        hidden = args[0] if args else kwargs["hidden_states"]
        placeholder, last = self._positions
        rows = torch.arange(len(hidden), device=hidden.device)
        hidden = hidden.index_put((rows, placeholder), hidden[rows, last])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _find(self, placeholders: Tensor) -> tuple[Tensor, Tensor]:
        """Of every row, where the placeholder and the last valid token stand; the same place in a row without any."""
        valid = torch.ones_like(placeholders) if self._mask is None else self._mask.bool()
        if valid.shape != placeholders.shape:
            raise ValueError(
                f"attention_mask must be [B, T] = {list(placeholders.shape)} as input_ids, got {list(valid.shape)}"
            )
        counts = (placeholders & valid).sum(dim=1)
        wrong = (counts != 1) & valid.any(dim=1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"input_ids must hold the placeholder token {self.token_id} once in every row, got {int(counts[row])} "
                f"in row {row}"
            )
        last = valid.shape[1] - 1 - valid.flip(1).to(torch.int8).argmax(dim=1)
        return torch.where(counts == 1, (placeholders & valid).to(torch.int8).argmax(dim=1), last), last

    def _is_foreign(self) -> bool:
        return threading.get_ident() != self._owner
