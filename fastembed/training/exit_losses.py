"""Losses that train a model's exits together, from the embeddings that a MultiExitEncoder makes of pairs.

Every loss is called as `loss(queries, documents)` with embeddings by exit, (layer, dim) -> tensor: queries [B, dim],
and documents [N, dim] whose first B rows answer the queries in their order; what follows, if anything, are documents
that answer none. `loss.exits` says which exits it takes and `loss.normalize` whether of unit length. Teachers are
detached.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_integer, check_not_negative, check_positive
from .._exits import LayerExit, check_exits, one_layer

Embeddings = Mapping[LayerExit, Tensor]
PairLoss = Callable[[Tensor, Tensor], Tensor]
Choice = TypeVar("Choice")

_LAYER_WEIGHTS: dict[str, Callable[[int], float]] = {
    "uniform": lambda layer: 1.0,
    "log": lambda layer: 1 / (1 + math.log(1 + layer)),
    "linear": lambda layer: 1 / (1 + layer),
}


class RankingLoss(nn.Module):
    """Cross-entropy of each query's scaled cosine to its document against those to all documents.

    The in-batch negatives loss (MultipleNegativesRankingLoss of sentence-transformers), on tensors.

    Args:
        scale: of the cosines; the inverse of a temperature.
    """

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        check_positive("scale", scale)
        self.scale = scale

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        """The loss of queries [B, D] and documents [N, D], N >= B."""
        scores = F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T
        return F.cross_entropy(self.scale * scores, _diagonal(scores))

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class ExitLoss(nn.Module):
    """What the losses have in common.

    Attributes:
        exits: the (layer, dim) pairs that it takes, the deepest and widest last.
        normalize: whether it takes embeddings of unit length.
    """

    def __init__(self, exits: Sequence[LayerExit], *, normalize: bool) -> None:
        super().__init__()
        self.exits: tuple[LayerExit, ...] = tuple(sorted(check_exits(exits, one_layer)))
        for layer, dim in self.exits:
            if layer < 0 or dim < 1:
                raise ValueError(f"exits must have layers of at least 0 and dims of at least 1, got {(layer, dim)}")
        self.normalize = normalize

    def forward(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        """The loss of a batch.

        Raises:
            TypeError: embeddings that are no mapping of tensors.
            ValueError: an exit that is missing, shapes other than the exit's, fewer documents than queries, or none.
        """
        self._check(queries, documents)
        return self.loss(*(self._widened(embeddings) for embeddings in (queries, documents)))

    def loss(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        """What a subclass computes of embeddings that have been checked: a scalar."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"exits={list(self.exits)}"

    def _widened(self, embeddings: Embeddings) -> Embeddings:
        """In float32 at least: in half precision the softmax of many scores is off by whole digits."""
        return {
            exit: embeddings[exit].to(torch.promote_types(embeddings[exit].dtype, torch.float32)) for exit in self.exits
        }

    def _check(self, queries: Embeddings, documents: Embeddings) -> None:
        rows = []
        for name, embeddings in (("queries", queries), ("documents", documents)):
            if not isinstance(embeddings, Mapping):
                raise TypeError(f"{name} must map (layer, dim) to tensors, got {type(embeddings).__name__}")
            if missing := [exit for exit in self.exits if exit not in embeddings]:
                raise ValueError(f"{name} must hold the exits {list(self.exits)}, got none for {missing}")
            for exit in self.exits:
                if not isinstance(embeddings[exit], Tensor):
                    raise TypeError(f"{name} must hold tensors, got {type(embeddings[exit]).__name__} at exit {exit}")
            count = len(embeddings[self.exits[0]])
            for exit in self.exits:
                if tuple(embeddings[exit].shape) != (count, exit[1]):
                    raise ValueError(
                        f"{name} must be {[count, exit[1]]} at exit {exit}, got shape {list(embeddings[exit].shape)}"
                    )
            rows.append(count)
        if not 1 <= rows[0] <= rows[1]:
            raise ValueError(f"documents must be at least as many as queries, and those 1, got {rows[1]} and {rows[0]}")


class MultiExitContrastiveLoss(ExitLoss):
    """Symmetric contrastive loss at every exit, weighted by depth: a model distils itself into its own early exits.

        loss = sum over exits of weight * (CE(S) + CE(S^T)) / 2,    S = scale * queries @ documents^T

    Args:
        exits: (layer, dim) pairs.
        weights: "depth", layer / deepest layer; "uniform", 1; or one number per exit, in the order of `exits`.
        scale: what cosines are multiplied by, the inverse of a temperature.
        learn_scale: whether it is learned, as the exponential of a parameter.

    Source: ModularStarEncoder, arXiv 2503.03008: exits 4, 9, 18, 27 and 36, weights i / 36, scale 10; the loss of CLIP.
    """

    def __init__(
        self,
        exits: Sequence[LayerExit],
        weights: str | Sequence[float] = "depth",
        *,
        scale: float = 10.0,
        learn_scale: bool = True,
    ) -> None:
        super().__init__(exits, normalize=True)
        check_positive("scale", scale)
        self.weights = _exit_weights(weights, [(layer, dim) for layer, dim in exits])
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)

    def loss(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        scale = self.log_scale.exp()
        losses = []
        for exit in self.exits:
            scores = scale * (queries[exit] @ documents[exit].T)
            own = _diagonal(scores)
            # Documents that answer no query look for none.
            symmetric = F.cross_entropy(scores, own) + F.cross_entropy(scores[:, : len(own)].T, own)
            losses.append(self.weights[exit] * symmetric / 2)
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class StarbucksLoss(ExitLoss):
    """Contrastive loss at fixed pairs of a layer and a dim, the small ones distilled from the scores of the largest.

        loss = CE(S_L / t)
             + sum over the others of CE(S_l / t) + distillation * KL(softmax(S_L / t) || softmax(S_l / t))

    where S_l = queries @ documents^T of the first d_l dims after layer l, one matrix product per exit.

    Args:
        exits: (layer, dim) pairs. The deepest and widest is the teacher.
        distillation: weight of the second term.
        temperature: t.
        normalize: whether it takes embeddings of unit length, which want a temperature of about 0.05. The paper's are
            plain dot products.

    Source: Starbucks, arXiv 2410.13230, the retrieval loss as released.
    """

    def __init__(
        self,
        exits: Sequence[LayerExit],
        *,
        distillation: float = 1.0,
        temperature: float = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__(exits, normalize=normalize)
        check_not_negative("distillation", distillation)
        check_positive("temperature", temperature)
        self.distillation = distillation
        self.temperature = temperature

    def loss(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        *small, largest = self.exits
        teacher = self._log_probabilities(queries[largest], documents[largest])
        own = _diagonal(teacher)
        total = F.nll_loss(teacher, own)
        for exit in small:
            student = self._log_probabilities(queries[exit], documents[exit])
            total = total + F.nll_loss(student, own) + self.distillation * _divergence(teacher, student)
        return total

    def _log_probabilities(self, queries: Tensor, documents: Tensor) -> Tensor:
        return (queries @ documents.T / self.temperature).log_softmax(dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, distillation={self.distillation}, temperature={self.temperature}"


class Matryoshka2dLoss(ExitLoss):
    """A loss on prefixes of the last layer and of layers drawn at random, which also imitate the last one's features.

        loss = sum over dims d of c_d pair_loss(e_L[:d])
             + 1/n sum over n layers l of w_l sum over dims d of c_d pair_loss(e_l[:d])
             + alignment * t * sum over those layers of KL(softmax(e_L / t) || softmax(e_l / t))

    e are pooled embeddings, whole and not normalised; prefixes are, before `pair_loss` sees them.

    Args:
        layers: the layers to train; the deepest is trained in every step.
        width: features of an embedding.
        dims: its prefixes.
        dim_weights: c, one per dim; all 1 by default.
        layers_per_step: n, how many of the other layers a step draws; None for all of them.
        dims_per_step: how many of the dims each layer of a step draws; None for all of them.
        layer_weighting: w of layer l: "uniform", 1; "log", 1 / (1 + ln(1 + l)); "linear", 1 / (1 + l); or a function.
        last_weight, prior_weight: further weights, of the last layer's term and of the others'.
        alignment, alignment_temperature: weight and t of the last term.
        pair_loss: of queries [B, d] and documents [N, d]; by default `RankingLoss()`.
        seed: of what is drawn.

    Sources: 2D Matryoshka, arXiv 2402.14776v1; as sentence-transformers 6.2 computes it (Matryoshka2dLoss).
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        dims: Sequence[int],
        *,
        dim_weights: Sequence[float] | None = None,
        layers_per_step: int | None = 1,
        dims_per_step: int | None = 1,
        layer_weighting: str | Callable[[int], float] = "uniform",
        last_weight: float = 1.0,
        prior_weight: float = 1.0,
        alignment: float = 1.0,
        alignment_temperature: float = 0.3,
        pair_loss: PairLoss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(_whole_exits(layers, width), normalize=False)
        self.dims = _check_prefixes(dims, width)
        self.dim_weights = _numbers("dim_weights", dim_weights, len(self.dims))
        for name, count in (("layers_per_step", layers_per_step), ("dims_per_step", dims_per_step)):
            if count is not None:
                check_integer(name, count, 1)
        if isinstance(layer_weighting, str):
            if layer_weighting not in _LAYER_WEIGHTS:
                raise ValueError(f"layer_weighting must be one of {', '.join(_LAYER_WEIGHTS)}, got {layer_weighting!r}")
            layer_weighting = _LAYER_WEIGHTS[layer_weighting]
        if not callable(layer_weighting):
            raise TypeError(f"layer_weighting must be a name or a function of the layer, got {layer_weighting!r}")
        for name, weight in (("last_weight", last_weight), ("prior_weight", prior_weight), ("alignment", alignment)):
            check_not_negative(name, weight)
        check_positive("alignment_temperature", alignment_temperature)
        self.layers_per_step = layers_per_step
        self.dims_per_step = dims_per_step
        self.layer_weighting = layer_weighting
        self.last_weight = last_weight
        self.prior_weight = prior_weight
        self.alignment = alignment
        self.alignment_temperature = alignment_temperature
        self.pair_loss = RankingLoss() if pair_loss is None else pair_loss
        self._random = random.Random(seed)

    def loss(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        *prior, last = self.exits
        total = self.last_weight * self._prefix_loss(queries[last], documents[last])
        teacher = self._log_probabilities(queries[last], documents[last])
        drawn = _draw(self._random, prior, self.layers_per_step)
        for exit in drawn:
            weight = self.prior_weight * self.layer_weighting(exit[0]) / len(drawn)
            total = total + weight * self._prefix_loss(queries[exit], documents[exit])
            student = self._log_probabilities(queries[exit], documents[exit])
            total = total + self.alignment * self.alignment_temperature * _divergence(teacher, student)
        return total

    def _prefix_loss(self, queries: Tensor, documents: Tensor) -> Tensor:
        losses = [
            self.dim_weights[index]
            * self.pair_loss(
                F.normalize(queries[:, : self.dims[index]], dim=1), F.normalize(documents[:, : self.dims[index]], dim=1)
            )
            for index in _draw(self._random, range(len(self.dims)), self.dims_per_step)
        ]
        return torch.stack(losses).sum()

    def _log_probabilities(self, queries: Tensor, documents: Tensor) -> Tensor:
        return (torch.cat([queries, documents]) / self.alignment_temperature).log_softmax(dim=1)

    def extra_repr(self) -> str:
        return f"layers={[layer for layer, _ in self.exits]}, dims={list(self.dims)}"


class ESELoss(ExitLoss):
    """Espresso sentence embeddings: every layer learns a prefix of k dims, which compresses its principal components.

        loss = pair_loss(e_L) + pair_loss(e_L[:k]) + A(e_L)
             + 1/n sum over the n other layers l of (pair_loss(e_l[:k]) + A(e_l)) / (1 + ln(1 + l))
        A(e) = MSE(e[:k], P) + t KL(softmax(P / t) || softmax(e[:k] / t)),    P = e U diag(S), detached
        U, S: the k largest singular vectors and values of softmax(e^T e / sqrt(D))

    e are pooled embeddings of queries and documents, whole and not normalised. A singular vector is determined up to
    its sign; here its largest entry is positive, so that the target does not flip from one step to the next. The
    decomposition is exact, D^3 operations per layer.

    Args:
        layers: the layers to train; the deepest counts as the last. The release takes 0 to L - 2 beside it.
        width: D, features of an embedding.
        dim: k.
        temperature: t.
        pair_loss: of queries [B, d] and documents [N, d]; by default `RankingLoss()`.

    Source: Espresso Sentence Embeddings, arXiv 2402.14776v2 and later, as released in AnglE.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        dim: int = 128,
        *,
        temperature: float = 1.0,
        pair_loss: PairLoss | None = None,
    ) -> None:
        super().__init__(_whole_exits(layers, width), normalize=False)
        (self.dim,) = _check_prefixes([dim], width)
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.pair_loss = RankingLoss() if pair_loss is None else pair_loss

    def loss(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        *prior, last = self.exits
        total = self.pair_loss(queries[last], documents[last]) + self._prefix_loss(queries[last], documents[last])
        for exit in prior:
            weight = _LAYER_WEIGHTS["log"](exit[0]) / len(prior)
            total = total + weight * self._prefix_loss(queries[exit], documents[exit])
        return total

    def _prefix_loss(self, queries: Tensor, documents: Tensor) -> Tensor:
        embeddings = torch.cat([queries, documents])
        prefix = embeddings[:, : self.dim]
        target = _principal_components(embeddings.detach(), self.dim)
        divergence = _divergence(
            (target / self.temperature).log_softmax(dim=1), (prefix / self.temperature).log_softmax(dim=1)
        )
        ranking = self.pair_loss(queries[:, : self.dim], documents[:, : self.dim])
        return ranking + F.mse_loss(prefix, target) + self.temperature * divergence

    def extra_repr(self) -> str:
        return f"layers={[layer for layer, _ in self.exits]}, dim={self.dim}, temperature={self.temperature}"


@torch.no_grad()
def _principal_components(embeddings: Tensor, count: int) -> Tensor:
    """[B, count]: coordinates of embeddings [B, D] along the main directions of their features' affinities."""
    affinity = (embeddings.T @ embeddings / math.sqrt(embeddings.shape[1])).softmax(dim=1)
    vectors, values, _ = torch.linalg.svd(affinity)
    vectors, values = vectors[:, :count], values[:count]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return embeddings @ (vectors * largest.sign() * values)


def _diagonal(scores: Tensor) -> Tensor:
    """The document of each query: the one of its number."""
    return torch.arange(len(scores), device=scores.device)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities [B, N], mean over the rows; the teacher learns nothing from it."""
    return F.kl_div(student, teacher.detach(), reduction="batchmean", log_target=True)


def _draw(generator: random.Random, choices: Sequence[Choice], count: int | None) -> Sequence[Choice]:
    return choices if count is None or count >= len(choices) else generator.sample(choices, count)


def _whole_exits(layers: Sequence[int], width: int) -> list[LayerExit]:
    check_integer("width", width, 1)
    if not isinstance(layers, (list, tuple, range)):
        raise TypeError(f"layers must be a list of ints, got {layers!r}")
    return [(layer, width) for layer in layers]


def _check_prefixes(dims: Sequence[int], width: int) -> tuple[int, ...]:
    if not isinstance(dims, (list, tuple)) or not all(type(dim) is int for dim in dims):
        raise TypeError(f"dims must be a list of ints, got {dims!r}")
    if not dims or not all(1 <= dim <= width for dim in dims) or len(set(dims)) < len(dims):
        raise ValueError(f"dims must be distinct and lie between 1 and the width {width}, got {list(dims)}")
    return tuple(dims)


def _exit_weights(weights: str | Sequence[float], exits: Sequence[LayerExit]) -> dict[LayerExit, float]:
    if weights == "uniform":
        return dict.fromkeys(exits, 1.0)
    if weights == "depth":
        deepest = max(layer for layer, _ in exits)
        if deepest == 0:
            raise ValueError(f"weights must not be 'depth' where every exit is at layer 0, got exits {list(exits)}")
        return {(layer, dim): layer / deepest for layer, dim in exits}
    if isinstance(weights, str):
        raise ValueError(f"weights must be 'depth', 'uniform' or one number per exit, got {weights!r}")
    return dict(zip(exits, _numbers("weights", weights, len(exits)), strict=True))


def _numbers(name: str, values: Sequence[float] | None, count: int) -> list[float]:
    if values is None:
        return [1.0] * count
    if len(values) != count:
        raise ValueError(f"{name} must be {count} numbers, got {len(values)}")
    for value in values:
        check_not_negative(name, value)
    return [float(value) for value in values]
