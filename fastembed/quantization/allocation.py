"""Bit-levels under a byte budget: the best allocation, and the two-level scheme of an order of importance."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Choice:
    """One bit-level that a layer may get: what it costs, and what error it causes."""

    bits: int
    nbytes: int
    error: float


def allocate(layers: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """The choice per layer that sums to the least error of all with at most `budget` bytes.

    The multiple-choice knapsack problem, solved exactly: dynamic programming over the layers on the front of states
    that no other beats in bytes and error both, less those that even the linear relaxation of the remaining layers
    (Sinha and Zoltners, "The multiple-choice knapsack problem", 1979) cannot bring below a solution already known.
    Among equal errors the fewest bytes win, so the result is determined.

    Raises:
        ValueError: not even the cheapest choices fit.
    """
    hulls = [_hull(choices) for choices in layers]
    cheapest = sum(hull[0].nbytes for hull in hulls)
    if cheapest > budget:
        raise ValueError(f"budget must be at least {cheapest} bytes for these layers, got {budget}")
    # What the layers from each one on can reach at best.
    bounds = [_relaxation(hulls[index:]) for index in range(len(hulls) + 1)]
    incumbent = _greedy(hulls, budget)
    states = np.zeros((1, 2))  # bytes, error
    history = []
    for index, choices in enumerate(layers):
        options = np.array([[choice.nbytes, choice.error] for choice in choices], dtype=np.float64)
        grown = (states[:, None] + options[None]).reshape(-1, 2)
        order = np.lexsort((grown[:, 1], grown[:, 0]))
        order = order[grown[order, 0] <= budget]
        errors = grown[order, 1]
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(errors)[:-1]])
        order = order[errors < best_before]
        floor, costs, gains = bounds[index + 1]
        left = budget - grown[order, 0] - floor[0]
        possible = grown[order, 1] + floor[1] - np.interp(left, costs, gains)
        order = order[(left >= 0) & (possible <= incumbent * (1 + 1e-9))]
        history.append((order // len(choices), order % len(choices)))
        states = grown[order]
    state = len(states) - 1  # the front's errors fall with its bytes
    chosen = []
    for choices, (parents, picks) in zip(reversed(layers), reversed(history), strict=True):
        chosen.append(choices[picks[state]])
        state = parents[state]
    return chosen[::-1]


def two_levels(layers: Sequence[tuple[Choice, Choice]], scores: Sequence[float], budget: int) -> list[Choice]:
    """The higher of two levels for the most important layers as far as the budget goes, the lower for all others.

    Section 3 of Dumitru et al., "Layer-Wise Quantization" (arXiv 2406.17415), where all layers are of one size, so that
    the budget is a number of layers. Here a layer that does not fit any more is passed over for less important ones
    that do. Of equal scores the earlier layer counts as more important.

    Raises:
        ValueError: not even the lower level fits everywhere.
    """
    chosen = [low for low, _ in layers]
    spare = budget - sum(choice.nbytes for choice in chosen)
    if spare < 0:
        raise ValueError(f"budget must be at least {budget - spare} bytes for these layers, got {budget}")
    for index in sorted(range(len(layers)), key=lambda index: -scores[index]):
        low, high = layers[index]
        if (step := high.nbytes - low.nbytes) <= spare:
            spare -= step
            chosen[index] = high
    return chosen


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of error over bytes, from the cheapest to the one of least error."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _rate(less: Choice, more: Choice) -> float:
    return (less.error - more.error) / (more.nbytes - less.nbytes)


def _relaxation(hulls: Sequence[Sequence[Choice]]) -> tuple[tuple[int, float], np.ndarray, np.ndarray]:
    """(bytes, error) of the cheapest choices, and error saved by bytes spent beyond them when steps can be split."""
    floor = (sum(hull[0].nbytes for hull in hulls), sum(hull[0].error for hull in hulls))
    steps = sorted(
        (-_rate(less, more), more.nbytes - less.nbytes, less.error - more.error)
        for hull in hulls
        for less, more in pairwise(hull)
    )
    costs = np.concatenate([[0.0], np.cumsum([cost for _, cost, _ in steps])])
    gains = np.concatenate([[0.0], np.cumsum([gain for *_, gain in steps])])
    return floor, costs, gains


def _greedy(hulls: Sequence[Sequence[Choice]], budget: int) -> float:
    """The error of a good allocation: the steps along the hulls, best rate first, that fit."""
    spare = budget - sum(hull[0].nbytes for hull in hulls)
    error = sum(hull[0].error for hull in hulls)
    reached = [0] * len(hulls)
    steps = sorted(
        (-_rate(less, more), layer, step)
        for layer, hull in enumerate(hulls)
        for step, (less, more) in enumerate(pairwise(hull))
    )
    for _, layer, step in steps:
        less, more = hulls[layer][step : step + 2]
        if reached[layer] == step and more.nbytes - less.nbytes <= spare:
            reached[layer] += 1
            spare -= more.nbytes - less.nbytes
            error -= less.error - more.error
    return error
