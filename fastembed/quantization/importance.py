"""How much each linear layer, or transformer block, matters: LIM, ZD, and the measured effect of every bit-level."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .calibration import Calibration, hooks, input_of, tokens_of

# Random directions of the embedding that the measured effect is averaged over, per text.
_PROBES = 2
_SEED = 0
# Inputs and gradients that are held at once; more layers than fit take several passes over the calibration data.
_KEPT_BYTES = 1 << 30
# Weights whose errors at all levels are held at once.
_SLICE = 1 << 21


def layer_input_modification(calibration: Calibration, blocks: Sequence[nn.Module]) -> list[float]:
    """LIM of transformer blocks: minus the cosine similarity of a block's input and output, -1 to 1.

    Per token, and then the mean over all valid tokens of the calibration data. Higher is more important: the block
    changes more. Section 3.1 of Dumitru et al., "Layer-Wise Quantization" (arXiv 2406.17415).
    """
    sums = dict.fromkeys(blocks, 0.0)
    counts = dict.fromkeys(blocks, 0)
    for module, args, output, mask in _calls(calibration, blocks):
        cosines = F.cosine_similarity(tokens_of(args, mask).float(), tokens_of(output, mask).float(), dim=-1)
        sums[module] += float(cosines.double().sum())
        counts[module] += cosines.numel()
    return [-sums[block] / max(1, counts[block]) for block in blocks]


def linear_input_modification(calibration: Calibration, layers: Sequence[nn.Module]) -> list[float]:
    """LIM of single linear layers: minus the similarity of the tokens' Gram matrices before and after, -1 to 0.

    A linear layer may change the number of features, where a token's own cosine has no meaning. How similar the tokens
    are to each other does (linear CKA without centring: Kornblith et al., "Similarity of Neural Network Representations
    Revisited", 2019). Per batch, and then the mean over the batches.
    """
    values: dict[nn.Module, list[float]] = {layer: [] for layer in layers}
    for module, args, output, mask in _calls(calibration, layers):
        x, y = tokens_of(args, mask).float(), tokens_of(output, mask).float()
        values[module].append(float(F.cosine_similarity((x @ x.T).flatten(), (y @ y.T).flatten(), dim=0)))
    return [-sum(values[layer]) / max(1, len(values[layer])) for layer in layers]


def z_score_share(weights: Sequence[Tensor]) -> float:
    """ZD of the weights of a layer or block together: the share whose z-score exceeds 1, 0 to 1.

    One-sided, as the paper's text defines it, with the mean and deviation of all weights. Smaller is more important.
    Section 3.2 of Dumitru et al., "Layer-Wise Quantization" (arXiv 2406.17415).
    """
    count = sum(weight.numel() for weight in weights)
    mean = sum(float(weight.double().sum()) for weight in weights) / count
    variance = sum(float((weight.double() - mean).square().sum()) for weight in weights) / count
    limit = mean + variance**0.5
    return sum(int((weight.double() > limit).sum()) for weight in weights) / count


def measured_errors(
    calibration: Calibration,
    layers: Sequence[Sequence[nn.Linear]],
    levels: Sequence[int],
    dequantized: Iterable[Callable[[Tensor, int], Tensor]],
    progress: bool = False,
) -> list[dict[int, float]]:
    """How far the embeddings move when one layer alone is quantised, for every layer and bit-level.

    Half the mean squared distance from the unquantised embedding (of unit length: 1 - cosine), to second order
    in the weight's error D (Gauss-Newton): the embedding moves by J(D x) for the layer's inputs x and the Jacobian J of
    the embedding in the layer's output. For a random direction v, J^T v is one backward pass for all layers together,
    and E_v (v . J D x)^2 is the squared distance (Hutchinson's estimator). So all levels of all layers cost a few
    passes, where quantising and running the model for each would take one pass each. Nor does a level take a pass over
    the tokens: v . J D x, summed over a text, is the inner product of D and one matrix, the gradient in the weight.

    Args:
        calibration: model and data.
        layers: for every weight, the layers that have it.
        levels: bit-levels.
        dequantized: for every weight, (rows of it, bits) -> what they stand for when they are quantised.
        progress: show a progress bar.

    Returns:
        For every weight, level -> error.

    Raises:
        ValueError: the calibration yields NaN, or no gradient reaches a layer.
    """
    errors: list[dict[int, float]] = []
    quantizers = iter(dequantized)
    with tqdm(total=len(layers), desc="Measuring layers", unit=" layer", disable=not progress) as bar:
        for chunk in _chunks(calibration, layers):
            kept = _inputs_and_gradients(calibration, [module for group in chunk for module in group])
            for group in chunk:
                weight = group[0].weight.detach()
                distances = _distances(weight, levels, next(quantizers), [kept[m] for m in group])
                errors.append(dict(zip(levels, distances, strict=True)))
                bar.update()
    return errors


# One call of a layer: its input, and the gradient in its output for every probe.
_Call = tuple[Tensor, list[Tensor]]


def _inputs_and_gradients(calibration: Calibration, modules: Sequence[nn.Module]) -> dict[nn.Module, list[list[_Call]]]:
    """For every module and batch, its calls."""
    kept: dict[nn.Module, list[list[_Call]]] = {module: [] for module in modules}
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # Frozen models have no graph to hang on to, hence a leaf; the model may change it in place, hence a copy.
        watched = output if output.requires_grad else output.detach().requires_grad_()
        seen.append((module, input_of(args, kwargs).detach(), watched))
        return watched.clone()

    generator = torch.Generator("cpu").manual_seed(_SEED)
    with hooks(modules, watch):
        for embeddings, mask in calibration.run(gradients=True):
            if not embeddings.requires_grad or not seen:
                raise ValueError("importance='measured' needs gradients from the model's output to its linear layers")
            gradients = []
            for probe in range(_PROBES):
                direction = torch.randn(embeddings.shape, generator=generator, dtype=torch.float32, device="cpu").to(
                    embeddings
                )
                if mask is not None and embeddings.shape[:-1] == mask.shape:
                    direction *= mask[..., None]
                outputs = [output for *_, output in seen]
                try:
                    of_outputs = torch.autograd.grad(
                        embeddings, outputs, direction, retain_graph=probe + 1 < _PROBES, allow_unused=True
                    )
                except RuntimeError as error:  # SPLADE's pooling, for one, overwrites what its gradient needs
                    raise ValueError(
                        "importance='measured' needs gradients from the model's output to its linear layers "
                        f"('lim' and 'zd' do not), got {error}"
                    ) from error
                gradients.append(of_outputs)
            for module in kept:
                kept[module].append([])
            for call, (module, x, output) in enumerate(seen):
                probes = [torch.zeros_like(output) if g[call] is None else g[call].detach() for g in gradients]
                kept[module][-1].append((x, probes))
            seen.clear()
    return kept


def _distances(
    weight: Tensor,
    levels: Sequence[int],
    dequantized: Callable[[Tensor, int], Tensor],
    modules: Sequence[Sequence[Sequence[_Call]]],
) -> list[float]:
    """Half the mean squared distance by which a weight's error moves the embeddings of each text, for every level."""
    batches = [[call for calls in calls_of_batch for call in calls] for calls_of_batch in zip(*modules, strict=True)]
    # Of calls with as many rows, the rows are those of the same texts.
    moves: list[dict[int, Tensor]] = [{} for _ in batches]
    step = max(1, _SLICE // weight.shape[1])
    for start in range(0, len(weight), step):
        outputs = slice(start, start + step)
        piece = weight[outputs]
        differences = torch.stack([dequantized(piece, level) - piece.float() for level in levels])
        for batch, of_rows in zip(batches, moves, strict=True):
            for x, gradients in batch:
                move = _moves(differences, x, [gradient[..., outputs] for gradient in gradients])
                rows = move.shape[-1]
                of_rows[rows] = of_rows[rows] + move if rows in of_rows else move
    squares = sum(
        (move.double().square().sum(dim=(1, 2)) / _PROBES for of_rows in moves for move in of_rows.values()),
        torch.zeros(len(levels), dtype=torch.float64, device=weight.device),
    )
    texts = sum(max(of_rows, default=0) for of_rows in moves)
    return [0.5 * float(square) / max(1, texts) for square in squares]


def _moves(differences: Tensor, x: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """[levels, probes, rows]: the sum over a row's tokens of g . D x, for every error D of `differences`."""
    rows = len(x) if x.dim() > 1 else 1
    tokens = x.reshape(rows, -1, x.shape[-1]).float()
    probes = torch.stack([g.reshape(*tokens.shape[:2], -1) for g in gradients]).float()  # [probes, rows, tokens, out]
    levels = len(differences)
    if tokens.shape[1] * (levels - _PROBES) <= _PROBES * levels:
        outputs = torch.einsum("rti,loi->lrto", tokens, differences)
        return torch.einsum("lrto,prto->lpr", outputs, probes)
    # The sum is the inner product of D and the gradient in the weight, which is the same for all levels.
    moves = [
        differences.flatten(1) @ (gradient.mT @ row).flatten(1).T
        for row, gradient in zip(tokens, probes.unbind(1), strict=True)
    ]
    return torch.stack(moves, dim=-1)


def _chunks(calibration: Calibration, layers: Sequence[Sequence[nn.Linear]]) -> Iterator[list[Sequence[nn.Linear]]]:
    """The layers in runs whose inputs and gradients fit into `_KEPT_BYTES`."""
    sizes: dict[nn.Module, int] = {module: 0 for group in layers for module in group}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        sizes[module] += 4 * (input_of(args, kwargs).numel() + _PROBES * output.numel())

    with hooks(list(sizes), count):
        for _ in calibration.run():
            pass
    chunk: list[Sequence[nn.Linear]] = []
    held = 0
    for group in layers:
        size = sum(sizes[module] for module in group)
        if chunk and held + size > _KEPT_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(group)
        held += size
    yield chunk


def hessians(calibration: Calibration, layers: Sequence[Sequence[nn.Linear]]) -> Iterator[Tensor]:
    """X^T X of the inputs of every weight, float32 [in_features, in_features]; in several passes if they need much."""
    remaining = list(layers)
    while remaining:
        chunk: list[Sequence[nn.Linear]] = []
        held = 0
        while remaining and (not chunk or held + 4 * remaining[0][0].in_features ** 2 <= _KEPT_BYTES):
            held += 4 * remaining[0][0].in_features ** 2
            chunk.append(remaining.pop(0))
        sums = {group[0]: _empty_hessian(group[0]) for group in chunk}
        first: dict[nn.Module, nn.Linear] = {module: group[0] for group in chunk for module in group}
        for module, x, _, mask in _calls(calibration, list(first)):
            rows = tokens_of(x, mask).float()
            sums[first[module]].addmm_(rows.T, rows)
        for group in chunk:
            yield sums.pop(group[0])


def _empty_hessian(layer: nn.Linear) -> Tensor:
    return torch.zeros(2 * [layer.in_features], dtype=torch.float32, device=layer.weight.device)


def _calls(
    calibration: Calibration, modules: Sequence[nn.Module]
) -> Iterator[tuple[nn.Module, Tensor, Tensor, Tensor | None]]:
    """(module, input, output, mask of valid tokens) of every call while the model runs; one batch is held at a time."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((module, input_of(args, kwargs), output if isinstance(output, Tensor) else output[0]))

    with hooks(modules, watch):
        for _, mask in calibration.run():
            for module, given, output in seen:
                yield module, given, output, mask
            seen.clear()
