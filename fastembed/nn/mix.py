"""Embeddings from several layers at once: their pooled vectors, mixed by fixed or learned weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops._pooling_checks import check_modes
from ..ops.pooling import finish_pooled, pool_exits


class LayerMix(nn.Module):
    """One embedding from several layers, a weighted sum of them: y = gamma * sum over l of a_l pool(h_l), then
    truncated and normalised.

    Pooling comes first, so that what is mixed is one vector per sequence and layer: for every mode but "max" that is
    the same as pooling the mixed hidden states (see `before_pooling`), and every layer is read once.

    - first-last average (SimCSE): `LayerMix([0.5, 0.5])` on the output of the first layer and of the last;
    - surface fusion: `LayerMix([0.2, 0.8])` on the embedding output and the last layer;
    - a learned scalar mix (ELMo, AllenNLP's ScalarMix): `LayerMix(number_of_layers, trainable=True)`.

    Args:
        weights: one per layer, positive, summing to 1; or how many layers, for equal ones.
        trainable: whether the weights, as a softmax that starts at those given, and gamma, which starts at 1, are
            learned. They are part of the state dict either way.
        before_pooling: mix the hidden states and pool the mixture, which differs for "max" only, and keeps one more
            hidden state.
        mode, dims, normalize, out_dtype: as `fastembed.pool_exits` takes them; `dims` is one list of ints.

    Shapes:
        hidden_states: a list of [B, T, D], one per weight, or packed [N, D] or [1, N, D] with `cu_seqlens`.
        attention_mask: [B, T]. cu_seqlens: [B + 1].
        Returns: dim -> [B, dim].

    Raises:
        TypeError, ValueError: weights that are no positive numbers summing to 1, a number of hidden states that is not
            that of the weights, or of different sizes; and as `pool_exits`.

    Sources: arXiv 1802.05365 (ELMo, equation 1); arXiv 2012.14768 (SurfaceFusion, which mixes the embedding layer with
    the last; its mixture of output distributions is here one of pooled vectors); arXiv 2104.08821 (SimCSE, first-last
    average).
    """

    def __init__(
        self,
        weights: int | Sequence[float],
        *,
        trainable: bool = False,
        before_pooling: bool = False,
        mode: str | Sequence[str] = "mean",
        dims: Sequence[int] | None = None,
        normalize: bool = True,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_modes(mode)
        logits = torch.tensor(_check_weights(weights), dtype=torch.float32).log()
        gamma = torch.ones(())
        self.logits: Tensor
        self.gamma: Tensor
        if trainable:
            self.logits, self.gamma = nn.Parameter(logits), nn.Parameter(gamma)
        else:
            self.register_buffer("logits", logits)
            self.register_buffer("gamma", gamma)
        self.before_pooling = before_pooling
        self.mode = mode
        self.dims = dims
        self.normalize = normalize
        self.out_dtype = out_dtype

    @property
    def weights(self) -> Tensor:
        """The weights in use, [layers]; they sum to 1."""
        return self.logits.softmax(0)

    def forward(
        self, hidden_states: Sequence[Tensor], attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Pool, mix, truncate and normalise; see the class for shapes."""
        self._check_number(hidden_states)
        first = hidden_states[0]
        accumulated = torch.promote_types(first.dtype, torch.float32)
        out_dtype = first.dtype if self.out_dtype is None else self.out_dtype
        if self.before_pooling and "max" in self._modes():
            hidden_states = [self.mix([hidden.to(accumulated) for hidden in hidden_states])]
        pooled = pool_exits(
            hidden_states,
            attention_mask,
            cu_seqlens=cu_seqlens,
            mode=self.mode,
            normalize=False,
            out_dtype=accumulated,
        )
        vectors = [vector for of_layer in pooled for vector in of_layer.values()]
        return self.finish(vectors[0] if len(vectors) == 1 else self.mix(vectors), out_dtype=out_dtype)

    def mix(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weighted sum of tensors of one shape, one per layer, times gamma; in the dtype of the first.

        Raises:
            ValueError: another number of tensors than of weights, or shapes that differ.
        """
        self._check_number(tensors)
        if len({tensor.shape for tensor in tensors}) > 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ValueError(f"hidden_states must be of one shape to be mixed, got {shapes}")
        weights = (self.gamma * self.weights).to(tensors[0].dtype).unbind()
        mixed = weights[0] * tensors[0]
        for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, tensor)
        return mixed

    def finish(self, mixed: Tensor, *, out_dtype: torch.dtype) -> dict[int, Tensor]:
        """Truncate and normalise a mixture [B, D] of pooled vectors."""
        return finish_pooled([mixed], self.dims, self.normalize, out_dtype)[0]

    def extra_repr(self) -> str:
        return f"layers={len(self.logits)}, mode={self.mode!r}, before_pooling={self.before_pooling}, dims={self.dims}"

    def _modes(self) -> Sequence[str]:
        return (self.mode,) if isinstance(self.mode, str) else self.mode

    def _check_number(self, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self.logits):
            raise ValueError(f"hidden_states must be as many as the weights, {len(self.logits)}, got {len(tensors)}")


def _check_weights(weights: int | Sequence[float]) -> list[float]:
    if isinstance(weights, int) and not isinstance(weights, bool):
        if weights < 1:
            raise ValueError(f"weights must be for at least one layer, got {weights}")
        return [1 / weights] * weights
    if not isinstance(weights, (list, tuple)) or not all(isinstance(weight, (int, float)) for weight in weights):
        raise TypeError(f"weights must be a number of layers or a list of numbers, one per layer, got {weights!r}")
    if not weights or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights must be positive and sum to 1, got {weights}")
    return [float(weight) for weight in weights]
