"""MultiExitEncoder: embeddings from several layers of a model in one forward pass, pooled as the layers run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import check_integer
from ._exits import (
    Exit,
    check_exits,
    check_heads,
    check_in_model,
    check_mixes,
    commutes,
    head_width,
    last_layer,
    layer_or_layers,
    layers_of,
    mix_name,
)
from .integrations import surgery
from .integrations.backbones import find_backbone, stream_layers, watch_layers
from .integrations.batches import Tokenizer, batches_by_length
from .integrations.libraries import is_sentence_transformer
from .integrations.prompts import valid_tokens
from .nn.mix import LayerMix
from .ops._pooling_checks import check_modes, flat_mask
from .ops.pooling import finish_pooled, output_columns, pool_exits

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# As sentence-transformers names them, and the dtype in which `pool_exits` writes them.
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "ubinary": torch.uint8}


class MultiExitEncoder(nn.Module):
    """An encoder with several exits: pairs of a layer and a number of Matryoshka dims, all from one forward pass.

    Every exit is pooled the moment its layer has run, so no hidden states are kept; the pass ends after the last exit
    asked for. Exits of one layer share one pass over its hidden states (`fastembed.pool_exits`).

    Works on the modules of the model given, which stays usable by itself, swapped (`fastembed.swap`) or not; the
    parameters are shared. Gradients flow through every exit, so it can be trained.

    Args:
        model: a SentenceTransformer, whose tokenizer, pooling mode, normalisation and prompts are taken over; or a
            transformers model, encoder or decoder, text or vision.
        exits: (layer, dim) pairs; layer 0 is the embedding output, layer L the last. Several layers in place of one,
            as in ((1, 6), 384), are pooled and mixed: their average, unless `mixes` says otherwise. None: all dims of
            the last layer.
        tokenizer: of the transformers model, for `encode`.
        mode: how tokens are pooled, as in `pool_exits`; of several modes the vectors stand side by side. None: as the
            SentenceTransformer does, else "mean".
        normalize: whether embeddings are L2-normalised, after truncation. None: as the SentenceTransformer does, else
            True.
        include_prompt: whether the tokens of a prompt are pooled too. None: as the SentenceTransformer does, else True.
        final_norm: whether hidden states of earlier layers go through the norm behind the last one as well. It makes
            no difference to models that normalise inside each layer (BERT and its kin); for the others (ModernBERT,
            Llama, T5, ViT and so on) earlier hidden states come without it, as `output_hidden_states` has them, where
            a model cut off at that layer would normalise them. The last layer's always go through it.
        heads: for exits of some layers a module from hidden_size features to any number of them. An `nn.Linear` acts
            on the pooled vector where that is the same (not for "max", nor for "mean_sqrt_len" with a bias); anything
            else acts on every token first.
        mixes: for exits of several layers the `nn.LayerMix` whose weights to mix them by, fixed or learned. The layers
            of such an exit have no heads.
        select: which tokens to pool, of those that the attention mask has: from input_ids [B, T] to bool [B, T], such
            as `FromToken(separator_id)` or `OnlyTokens((separator_id,))` of fastembed.integrations.prompts. None: all.
        layers: where the list of layers stands in the model ("encoder.layer"), if it is not found by itself.
        max_length: tokens that `encode` keeps of a text. None: as many as the tokenizer says.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: exits out of range, repeated or none; an unknown mode; a model whose layers are not found; a head
            for a layer without exit, or of the wrong number of features; a mix for layers without exit, or of another
            number of layers.

    Sources: exits by layer and dim, arXiv 2402.14776 (2D Matryoshka), arXiv 2410.13230 (Starbucks) and arXiv 2503.03008
    (ModularStarEncoder, with heads).
    """

    def __init__(
        self,
        model: nn.Module,
        exits: Sequence[Exit] | None = None,
        *,
        tokenizer: Any = None,
        mode: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        include_prompt: bool | None = None,
        final_norm: bool = False,
        heads: Mapping[int, nn.Module] | None = None,
        mixes: Mapping[tuple[int, ...], LayerMix] | None = None,
        select: Callable[[Tensor], Tensor] | None = None,
        layers: str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        prompts: Mapping[str, str] = {}
        default_prompt_name = None
        if is_sentence_transformer(model):
            from .integrations.exit_models import read_pipeline

            pipeline = read_pipeline(model)  # type: ignore[arg-type]
            model, prompts, default_prompt_name = pipeline.model, pipeline.prompts, pipeline.default_prompt_name
            tokenizer = pipeline.tokenizer if tokenizer is None else tokenizer
            max_length = pipeline.max_length if max_length is None else max_length
            mode = pipeline.mode if mode is None else mode
            normalize = pipeline.normalize if normalize is None else normalize
            include_prompt = pipeline.include_prompt if include_prompt is None else include_prompt
        self.model = model
        self.training = model.training
        self.mode = "mean" if mode is None else mode
        self.normalize = True if normalize is None else normalize
        self.include_prompt = True if include_prompt is None else include_prompt
        self.final_norm = final_norm
        self.prompts = dict(prompts)
        self.default_prompt_name = default_prompt_name if default_prompt_name in self.prompts else None
        modes = len(check_modes(self.mode))
        if select is not None and not callable(select):
            raise TypeError(f"select must be a function of input_ids, got {type(select).__name__}")
        self.select = select
        self._backbone = backbone = find_backbone(model, layers)
        self.heads = nn.ModuleDict(check_heads(heads, backbone.widths))
        head_widths = {
            int(layer): head_width(head, layer, backbone.widths[int(layer)]) for layer, head in self.heads.items()
        }
        depth = len(backbone.layers)
        whole = [(depth, modes * head_widths.get(depth, backbone.hidden_size))]
        self.exits = check_exits(whole if exits is None else exits, layer_or_layers)
        check_in_model(self.exits, backbone.widths, head_widths, modes)
        if idle := {int(layer) for layer in self.heads} - {layer for layer, _ in self.exits}:
            raise ValueError(f"heads must belong to layers with an exit, got one for layer {min(idle)}")
        self.mixes = nn.ModuleDict(check_mixes(mixes, [layer for layer, _ in self.exits]))
        self._tokenizer = None if tokenizer is None else Tokenizer(tokenizer, max_length)

    def forward(
        self,
        exits: Sequence[Exit] | None = None,
        *,
        prompt_length: int = 0,
        out_dtype: torch.dtype | None = None,
        **inputs: Any,
    ) -> dict[Exit, Tensor]:
        """Embeddings of a batch.

        Args:
            exits: which of the encoder's exits; the pass stops after the last of them. None: all.
            prompt_length: tokens at the start of every sequence that are left out of pooling.
            out_dtype: of the embeddings, int8 and packed bits (uint8) included, as `pool_exits` takes it. None: that of
                the hidden states.
            **inputs: what the model's forward takes: input_ids [B, T] and attention_mask [B, T], or pixel_values, ...
                Without an attention mask every token counts.

        Returns:
            (layer, dim) -> [B, dim] (packed bits: [B, ceil(dim / 8)]).

        Raises:
            ValueError: exits that this encoder does not have, hidden states of another shape than the mask, or a
                prompt_length below 0.
        """
        wanted = self._choose(exits)
        pooled: dict[Exit, Tensor] = {}
        selected = None if self.select is None else _selected(self.select, inputs)
        pool = self._pooler(wanted, pooled, inputs.get("attention_mask"), selected, prompt_length, out_dtype)
        stream_layers(self._backbone, inputs, last_layer(wanted), pool)
        return {exit: pooled[exit] for exit in wanted}

    @contextmanager
    def observe(
        self, attention_mask: Tensor | None = None, *, exits: Sequence[Exit] | None = None, prompt_length: int = 0
    ) -> Iterator[dict[Exit, Tensor]]:
        """Pool the exits of a forward pass that is made inside the `with` block, whoever makes it, to its end.

        For callers that need the model's own output too, or that reach the model through something around it
        (a SentenceTransformer, DistributedDataParallel). The tokens that `select` leaves out have to be left out of the
        mask given.

            with encoder.observe(inputs["attention_mask"]) as embeddings:
                output = model(**inputs)
            embeddings[2, 64]

        Args:
            attention_mask, exits, prompt_length: as `forward` takes them.

        Yields:
            A dict that the pass fills: (layer, dim) -> [B, dim].

        Raises:
            RuntimeError: the model was not run inside the block.
            ValueError: as `forward`.
        """
        wanted = self._choose(exits)
        pooled: dict[Exit, Tensor] = {}
        pool = self._pooler(wanted, pooled, attention_mask, None, prompt_length, None)
        with watch_layers(self._backbone, last_layer(wanted), pool):
            yield pooled
        if missing := [exit for exit in wanted if exit not in pooled]:
            raise RuntimeError(
                f"{type(self.model).__name__} must run inside the block of observe, not compiled: {missing} not seen"
            )

    def _pooler(
        self,
        wanted: Sequence[Exit],
        pooled: dict[Exit, Tensor],
        mask: Tensor | None,
        selected: Tensor | None,
        prompt_length: int,
        out_dtype: torch.dtype | None,
    ) -> Callable[[int, Tensor], None]:
        """What pools the hidden states of a layer into `pooled` where they are wanted."""
        check_integer("prompt_length", prompt_length, 0)
        mask = None if mask is None else flat_mask(mask)
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask must be [B, T] or [B, 1, 1, T], got shape {list(mask.shape)}")
        dims: dict[int | tuple[int, ...], list[int]] = {}
        for layer, dim in wanted:
            dims.setdefault(layer, []).append(dim)
        to_mix: dict[tuple[int, ...], list[Tensor]] = {layers: [] for layers in dims if isinstance(layers, tuple)}
        needed = {layer for layers in dims for layer in layers_of(layers)}
        norm, depth = self._backbone.final_norm, len(self._backbone.layers)

        def pool(layer: int, hidden: Tensor) -> None:
            if layer not in needed:
                return
            if norm is not None and (self.final_norm or layer == depth):
                hidden = norm(hidden)
            if mask is not None and tuple(hidden.shape[:2]) != tuple(mask.shape):
                raise ValueError(
                    f"hidden states of layer {layer} must be [B, T, D] with B, T = {list(mask.shape)} as in "
                    f"attention_mask, got {list(hidden.shape)}"
                )
            valid = valid_tokens(hidden, mask, prompt_length)
            if selected is not None:
                valid = selected if valid is None else valid.bool() & selected
            if layer in dims:
                prefixes = self._pool(hidden, valid, dims[layer], layer, out_dtype)
                pooled.update({(layer, dim): prefix for dim, prefix in prefixes.items()})
            for layers, vectors in to_mix.items():
                if layer in layers:
                    vectors.append(self._pool_whole(hidden, valid))
                if layer == max(layers):
                    mixed = self._mix(layers, vectors)
                    prefixes = finish_pooled([mixed], dims[layers], self.normalize, out_dtype or hidden.dtype)[0]
                    pooled.update({(layers, dim): prefix for dim, prefix in prefixes.items()})
                    vectors.clear()

        return pool

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        exits: Sequence[Exit] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 32,
        precision: str = "float32",
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
    ) -> dict[Exit, Any]:
        """Embeddings of texts, batched by their number of tokens, in inference mode, on the model's device.

        Args:
            texts: a list of strings, or one string.
            exits: which of the encoder's exits. None: all.
            prompt: put in front of every text. `prompt_name`: the prompt of that name of the SentenceTransformer. If
                neither is given, the SentenceTransformer's default prompt, if it has one.
            batch_size: texts that go through the model together, at most; on the CPU long texts go in fewer.
            precision: "float32"; "float16"; "int8", each vector times 127 over its largest magnitude, which leaves
                cosines as they are; "ubinary", packed sign bits as `fastembed.pack_bits` makes them.
            show_progress_bar: whether to show one.
            convert_to_tensor: whether to return tensors on the model's device instead of NumPy arrays.

        Returns:
            (layer, dim) -> [len(texts), dim] (ubinary: [len(texts), ceil(dim / 8)]), in the order of the texts; of one
            string [dim].

        Raises:
            TypeError: texts, prompt or batch_size of another type.
            ValueError: no tokenizer, an unknown precision or prompt name, or a batch size below 1.
        """
        several = [texts] if isinstance(texts, str) else _check_texts(texts)
        if self._tokenizer is None:
            raise ValueError("tokenizer must be given to the MultiExitEncoder before texts can be encoded, got None")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        check_integer("batch_size", batch_size, 1)
        wanted = self._choose(exits)
        prompt = self._prompt(prompt, prompt_name)
        prompt_length = 0 if self.include_prompt else self._tokenizer.prompt_length(prompt)
        device = next(self.model.parameters()).device
        out_dtype = PRECISIONS[precision]
        target = device if convert_to_tensor else torch.device("cpu")
        shapes = {exit: (len(several), output_columns(exit[1], out_dtype)) for exit in wanted}
        results = {exit: torch.empty(shape, dtype=out_dtype, device=target) for exit, shape in shapes.items()}
        with surgery.evaluating(self), torch.inference_mode():
            for rows, inputs in batches_by_length(
                self._tokenizer, several, prompt, batch_size, device, show_progress_bar
            ):
                places = torch.from_numpy(rows).to(target)
                for exit, embedding in self(wanted, prompt_length=prompt_length, out_dtype=out_dtype, **inputs).items():
                    results[exit][places] = embedding.to(target)
        if isinstance(texts, str):
            results = {exit: embeddings[0] for exit, embeddings in results.items()}
        return results if convert_to_tensor else {exit: embeddings.numpy() for exit, embeddings in results.items()}

    def sentence_transformer(self, exit: Exit | None = None) -> "SentenceTransformer":
        """One exit as a SentenceTransformer of its own, with the layers behind it left out; shares the parameters.

        It encodes, saves and loads as any other, with or without fastembed, and gives the embeddings of `encode`.

        Args:
            exit: one of the encoder's exits. None: the last.

        Raises:
            ValueError: not an exit of this encoder; one that a shorter model would not give (see `final_norm`), that
                mixes layers or selects tokens, or whose head acts on tokens; or no tokenizer.
        """
        from .integrations.exit_models import exit_model

        (wanted,) = self._choose([self.exits[-1]] if exit is None else [exit])
        backbone = self._backbone
        layer, dim = wanted
        if isinstance(layer, tuple) or self.select is not None:
            raise ValueError(f"exit {wanted} must be of one layer and all tokens to become a SentenceTransformer")
        if backbone.final_norm is not None and not self.final_norm and layer < len(backbone.layers):
            raise ValueError(
                f"exit {wanted} must go through the norm behind the last layer, as it does in a shorter model: build "
                "the MultiExitEncoder with final_norm=True"
            )
        if self._tokenizer is None:
            raise ValueError("tokenizer must be given to the MultiExitEncoder, got None")
        head = self._head(layer)
        if isinstance(head, nn.Linear) and not commutes(head, self.mode):
            raise ValueError(
                f"exit {wanted} must have a head that acts on the pooled vector, as a SentenceTransformer's do, and "
                f"with mode {self.mode!r} it acts on every token"
            )
        return exit_model(
            backbone,
            (layer, dim),
            self._tokenizer,
            head,
            self.mode,
            self.normalize,
            self.include_prompt,
            self.prompts,
            self.default_prompt_name,
        )

    def extra_repr(self) -> str:
        return f"exits={list(self.exits)}, mode={self.mode!r}, normalize={self.normalize}, final_norm={self.final_norm}"

    def _choose(self, exits: Sequence[Exit] | None) -> tuple[Exit, ...]:
        if exits is None:
            return self.exits
        chosen = check_exits(exits, layer_or_layers)
        for exit in chosen:
            if exit not in self.exits:
                raise ValueError(f"exits must be of this encoder's, {list(self.exits)}, got {exit}")
        return chosen

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
        if prompt is None and name is None:
            name = self.default_prompt_name
        if name is None:
            return prompt or ""
        if prompt is not None:
            raise ValueError(f"prompt must be None when prompt_name is given, got {prompt!r}")
        if name not in self.prompts:
            raise ValueError(f"prompt_name must be one of {', '.join(self.prompts) or 'none'}, got {name!r}")
        return self.prompts[name]

    def _head(self, layer: int) -> nn.Module | None:
        return self.heads[str(layer)] if str(layer) in self.heads else None  # noqa: SIM401, a ModuleDict has no get

    def _mix(self, layers: tuple[int, ...], vectors: list[Tensor]) -> Tensor:
        """The mixture of pooled vectors that came in rising order of their layers."""
        in_order = [vectors[sorted(layers).index(layer)] for layer in layers]
        name = mix_name(layers)
        mix = self.mixes[name] if name in self.mixes else LayerMix(len(layers)).to(in_order[0].device)
        assert isinstance(mix, LayerMix)
        return mix.mix(in_order)

    def _pool(
        self, hidden: Tensor, mask: Tensor | None, dims: list[int], layer: int, out_dtype: torch.dtype | None
    ) -> dict[int, Tensor]:
        head = self._head(layer)
        if head is not None and commutes(head, self.mode):
            projected = head(self._pool_whole(hidden, mask, hidden.dtype))
            if mask is not None:  # a sequence without valid tokens stays zero, whatever the bias
                projected = torch.where(mask.bool().any(dim=1, keepdim=True), projected, 0)
            return finish_pooled([projected], dims, self.normalize, out_dtype)[0]
        tokens = hidden if head is None else head(hidden)
        return pool_exits([tokens], mask, mode=self.mode, dims=dims, normalize=self.normalize, out_dtype=out_dtype)[0]

    def _pool_whole(self, hidden: Tensor, mask: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """Pooled vectors, all of them and not normalised, in the dtype of the sums unless another is given."""
        dtype = dtype or torch.promote_types(hidden.dtype, torch.float32)
        (vectors,) = pool_exits([hidden], mask, mode=self.mode, normalize=False, out_dtype=dtype)[0].values()
        return vectors


def _selected(select: Callable[[Tensor], Tensor], inputs: Mapping[str, Any]) -> Tensor:
    if not isinstance(ids := inputs.get("input_ids"), Tensor):
        raise ValueError(f"inputs must have input_ids for select to choose from, got {', '.join(inputs) or 'none'}")
    selected = select(ids)
    if not isinstance(selected, Tensor) or selected.dtype != torch.bool or selected.shape != ids.shape:
        got = f"{selected.dtype} {list(selected.shape)}" if isinstance(selected, Tensor) else type(selected).__name__
        raise ValueError(f"select must return a bool tensor {list(ids.shape)}, as input_ids, got {got}")
    return selected


def _check_texts(texts: Any) -> list[str]:
    if isinstance(texts, (dict, bytes)) or not hasattr(texts, "__len__") or not hasattr(texts, "__getitem__"):
        raise TypeError(f"texts must be a string or a list of strings, got {type(texts).__name__}")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, got {type(text).__name__} at position {position}")
    return list(texts)
