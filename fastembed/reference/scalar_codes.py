"""Scalar codes in plain PyTorch, on any device: the quantisers and the search.

    <code, query> = step' (step <c, s> + lower sum(s)) + lower' total,   total = dim lower + step sum(c)

for a code lower + step c and a query lower' + step' s, with s = c' - 2^(bits' - 1).
"""

import math

import torch
from torch import Tensor

from .._checks import check_finite
from ..ops import _scalar_codes_checks as scalar_checks
from ..ops import _search_checks as checks
from .search import _allowed, _pack, _topk, _unpack

# Ends of the intervals of least squared error for a unit normal source, by bits.
NORMAL_INTERVAL = (0.0, 0.798, 1.493, 2.051, 2.514, 2.916, 3.278, 3.611, 3.922)
# How much of the loss of an interval is the error across the vector; and how often the loss is lowered.
ISOTROPIC, REFINEMENTS = 0.1, 5
# Of the grids that narrow down the scale of a vector.
INTERVALS = 16


def scalar_encode(
    x: Tensor, centroid: Tensor | None, signs: Tensor | None, bits: int, method: str, metric: str
) -> tuple[Tensor, Tensor]:
    """See `fastembed.ScalarQuantizer`. Returns codes uint8 [N, bits * ceil(D / 8)] and factors float32 [N, 4]."""
    scalar_checks.check_encode(x, centroid, signs, bits, method, metric)
    x = x.float().double()
    check_finite(x)
    if metric == "cosine":
        squares = x.square().sum(dim=1, keepdim=True)
        x = x * torch.where(squares > 0, 1 / squares.sqrt(), 1.0)
    extra = x.new_zeros(len(x))
    if centroid is not None:
        extra = ((x - centroid.double() / 2) * centroid.double()).sum(dim=1)
        x = x - centroid.double()
    if metric == "l2":
        extra = -x.square().sum(dim=1) / 2
    if signs is not None:
        x = rotate(x, signs)
    encode = {"rabitq": _rabitq, "osq": _optimized, "sign": _signs}[method]
    c, lower, step = encode(x, bits)
    planes = [_pack((c >> shift & 1).bool()) for shift in reversed(range(bits))]
    return torch.cat(planes, dim=1), torch.stack([lower, step, c.sum(dim=1).double(), extra], dim=1).float()


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """The random rotation of rows [N, D] that signs [rounds, D] of 0 and 1 stand for."""
    dim = x.shape[1]
    block = 1 << (dim.bit_length() - 1)
    half = dim // 2
    for turn, row in enumerate(signs):
        x = torch.where(row != 0, -x, x)
        if turn % 2 == 0:
            x = torch.cat([_hadamard(x[:, :block]), x[:, block:]], dim=1)
        else:
            x = torch.cat([x[:, : dim - block], _hadamard(x[:, dim - block :])], dim=1)
        if block != dim:
            a, middle, b = x[:, :half], x[:, half : dim - half], x[:, dim - half :]
            scale = math.sqrt(0.5)
            x = torch.cat([(a + b) * scale, middle, (a - b) * scale], dim=1)
    return x


def _hadamard(x: Tensor) -> Tensor:
    rows, count = x.shape
    half = 1
    while half < count:
        a, b = x.reshape(rows, count // (2 * half), 2, half).unbind(dim=2)
        x = torch.stack([a + b, a - b], dim=2).reshape(rows, count)
        half *= 2
    return x * (1 / math.sqrt(count))


def _rabitq(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    half = 2 ** (bits - 1)
    magnitudes = x.abs()
    steps = torch.stack([_best_steps(row, half - 1) for row in magnitudes]) if len(x) else x.long()
    c = torch.where(x > 0, half + steps, half - 1 - steps)
    product = (magnitudes * (steps + 0.5)).sum(dim=1)
    step = torch.where(product > 0, x.square().sum(dim=1) / product, 0.0)
    return torch.where(step[:, None] > 0, c, 0), step * (0.5 - half), step


def _best_steps(magnitudes: Tensor, most: int) -> Tensor:
    """The whole steps 0 .. most, int64 [D], that make steps + 1/2 the closest in angle to the magnitudes, [D]."""
    dim = len(magnitudes)

    def steps_at(scales: Tensor) -> Tensor:
        steps = (scales[..., None] * magnitudes).clamp(max=most).long()
        return torch.where(magnitudes > 0, steps, 0)

    def cosines(steps: Tensor) -> Tensor:
        return ((steps + 0.5) * magnitudes).sum(dim=-1) / (steps + 0.5).square().sum(dim=-1).sqrt()

    if not bool(magnitudes.any()):
        return torch.zeros_like(magnitudes, dtype=torch.int64)
    upper = math.inf if most <= 1 else (most + 1) / float(magnitudes.mean())
    low, high = 0.0, upper

    def at(*scales: float) -> Tensor:
        return steps_at(torch.tensor(scales, dtype=torch.float64, device=magnitudes.device))

    while int(at(low, high).diff(dim=0).sum()) > 2 * dim:
        width = (high - low) / INTERVALS
        best = int(cosines(at(*(low + i * width for i in range(INTERVALS + 1)))).argmax())
        low, high = low + max(best - 1, 0) * width, low + min(best + 1, INTERVALS) * width
    first, last = at(low, high)
    # One step more at each breakpoint: where a scaled magnitude reaches the next whole number.
    changes = last - first
    places = torch.repeat_interleave(torch.arange(dim, device=changes.device), changes)
    nth = torch.arange(len(places), device=changes.device) - (changes.cumsum(0) - changes)[places]
    reached = first[places] + 1 + nth
    order = (reached / magnitudes[places]).argsort(stable=True)
    places, reached = places[order], reached[order]
    products = ((first + 0.5) * magnitudes).sum() + magnitudes[places].cumsum(0)
    squares = (first + 0.5).square().sum() + (2.0 * reached).cumsum(0)
    best_so_far = torch.cat([cosines(first)[None], products / squares.sqrt()]).argmax()
    taken = places[: int(best_so_far)]
    return first + torch.bincount(taken, minlength=dim)


def _optimized(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    most = 2**bits - 1
    squares = x.square().sum(dim=1)
    smallest, largest = x.amin(dim=1), x.amax(dim=1)
    lower, upper = smallest, largest
    if bits < len(NORMAL_INTERVAL):
        mean = x.sum(dim=1) / x.shape[1]
        reach = NORMAL_INTERVAL[bits] * (x - mean[:, None]).square().mean(dim=1).sqrt()
        lower, upper = (mean - reach).clamp(smallest, largest), (mean + reach).clamp(smallest, largest)

    def positions(lower: Tensor, upper: Tensor) -> Tensor:
        a, b = lower[:, None], upper[:, None]
        return ((x.clamp(a, b) - a) * (most / (b - a)) + 0.5).floor()

    def losses(lower: Tensor, upper: Tensor) -> Tensor:
        off = x - (lower[:, None] + ((upper - lower) / most)[:, None] * positions(lower, upper))
        along = (x * off).sum(dim=1)
        return (1 - ISOTROPIC) * along * along / squares + ISOTROPIC * off.square().sum(dim=1)

    going = upper > lower
    flat = ~going
    loss = losses(lower, upper)
    for _ in range(REFINEMENTS if bits < len(NORMAL_INTERVAL) else 0):
        s = positions(lower, upper) / most
        aa, ab, bb = ((1 - s).square().sum(dim=1), ((1 - s) * s).sum(dim=1), s.square().sum(dim=1))
        ax, bx = (x * (1 - s)).sum(dim=1), (x * s).sum(dim=1)
        scale = (1 - ISOTROPIC) / squares
        m0, m1, m2 = (scale * p * q + ISOTROPIC * r for p, q, r in ((ax, ax, aa), (ax, bx, ab), (bx, bx, bb)))
        determinant = m0 * m2 - m1 * m1
        a, b = (m2 * ax - m1 * bx) / determinant, (m0 * bx - m1 * ax) / determinant
        refined = losses(a, b)
        still = ((a - lower).abs() < 1e-8) & ((b - upper).abs() < 1e-8)
        going = going & (determinant != 0) & (b > a) & ~still & ~(refined > loss)
        lower, upper, loss = (torch.where(going, new, old) for new, old in ((a, lower), (b, upper), (refined, loss)))
    c = torch.where(flat[:, None], 0.0, positions(lower, upper)).long()
    return c, lower, torch.where(flat, 0.0, (upper - lower) / most)


def _signs(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    level = x.square().mean(dim=1).sqrt()
    return (x > 0).long(), -level, 2 * level


def scalar_integers(codes: Tensor, bits: int, dim: int) -> Tensor:
    """The integers of codes: int32 [N, dim]."""
    planes = _unpack(codes.reshape(len(codes), bits, checks.code_bytes(dim)))[..., :dim]
    weights = 2 ** torch.arange(bits - 1, -1, -1, dtype=torch.int32, device=codes.device)
    return (planes * weights[:, None]).sum(dim=1, dtype=torch.int32)


def scalar_topk(
    queries: Tensor,
    query_factors: Tensor,
    query_bits: int,
    codes: Tensor,
    factors: Tensor,
    bits: int,
    dim: int,
    k: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastembed.scalar_topk`."""
    scalar_checks.check_topk(queries, query_factors, query_bits, codes, factors, bits, dim, k, mask, ids, ranges)
    checks.check_filter_values(len(codes), ids, ranges)
    c = scalar_integers(codes, bits, dim).double()
    lower, step, sums, extra = factors.unbind(dim=1)
    total = lower * dim + step * sums

    def products(s: Tensor) -> Tensor:
        return (s.double() @ c.T).float()

    def scores(rows: Tensor) -> Tensor:
        half = 2 ** (query_bits - 1)
        s = scalar_integers(queries[rows.squeeze(1)], query_bits, dim) - half
        query_lower, query_step, _, query_extra = query_factors[rows.squeeze(1)].T[..., None]
        if query_bits <= 8:
            product = products(s)
        else:  # the kernels' two bytes
            low = s & 127
            product = products((s - low) >> 7) * 128 + products(low)
        score = (step * product + lower * s.sum(dim=1, keepdim=True).float()) * query_step
        return ((score + total * (query_lower + query_step * half)) + extra) + (query_extra + 0)

    rows = torch.arange(len(queries), device=queries.device)[:, None]
    return _topk(rows, len(codes), k, scores, _allowed(len(codes), mask, ids, ranges), worst=float("-inf"))
