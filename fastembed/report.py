"""What was done to a model, as a value and as a table."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a module's name that is a number


@dataclass(frozen=True)
class SwapRow:
    """One replaced module.

    Attributes:
        name: where it stands in the model.
        kind: what it is now, "linear", "linear + gelu", "pooling", "pooling + normalize", "attention pooling", "latent
            attention".
        bits: bits per weight that are stored, scales and zero points included; None where there are no weights.
        bytes_before, bytes_after: of its parameters and buffers. Of tied layers the first carries them.
        level: bits of a weight's code; None where there are no weights.
        weights: their number. Of tied layers the first carries them.
        score: importance of the layer, or of the block that it is scored with; with importance "measured" the error
            that its level is expected to cause in the embeddings (1 minus the cosine). None where nothing was scored.
        error: of the reconstructed weight, relative to the weight (Frobenius norms).
    """

    name: str
    kind: str
    bits: float | None
    bytes_before: int
    bytes_after: int
    level: int | None = None
    weights: int = 0
    score: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did. `str()` of it is a table.

    Attributes:
        rows: the replaced modules, in the model's order.
        left: linear layers that stay as they are: name -> why.
        bytes_before, bytes_after: of all parameters and buffers of the model, in memory.
        bytes_kept: of the original modules kept aside for `unswap`, on top of bytes_after.
        bytes_on_disk: of the tensors that `fastembed.save_quantized` writes.
    """

    rows: tuple[SwapRow, ...]
    left: dict[str, str]
    bytes_before: int
    bytes_after: int
    bytes_kept: int
    bytes_on_disk: int = 0

    @property
    def average_bits(self) -> float | None:
        """Bits stored per quantised weight, scales, zero points and padding included; None where there are none."""
        weights = sum(row.weights for row in self.rows)
        stored = sum(row.bits * row.weights for row in self.rows if row.bits is not None)
        return stored / weights if weights else None

    def __str__(self) -> str:
        scored = any(row.score is not None for row in self.rows)
        header = ["module", "now", "bits", "error", "before", "after"]
        table = [[*header[:3], *(["score"] if scored else []), *header[3:]]]
        for names, rows in _alike(self.rows):
            bits = "" if rows[0].bits is None else f"{rows[0].bits:.2f}"
            scores = (
                [_number(max((row.score for row in rows if row.score is not None), default=None))] if scored else []
            )
            error = _number(max((row.error for row in rows if row.error is not None), default=None))
            before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
            table.append([names, rows[0].kind, bits, *scores, error, _size(before), _size(after)])
        average = "" if self.average_bits is None else f"{self.average_bits:.2f}"
        blank = [""] * (2 if scored else 1)
        table.append(["whole model", "", average, *blank, _size(self.bytes_before), _size(self.bytes_after)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = [
            [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in cells]
            for cells in (enumerate(zip(row, widths, strict=True)) for row in table)
        ]
        lines = ["  ".join(cells) for cells in aligned]
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if self.bytes_kept:
            lines.append(f"originals kept aside for unswap: {_size(self.bytes_kept)}")
        lines += [f"left as it is: {name} ({why})" for name, why in self.left.items()]
        return "\n".join(line.rstrip() for line in lines)


def _alike(rows: Sequence[SwapRow]) -> list[tuple[str, list[SwapRow]]]:
    """Rows that differ in one number of their name only, as one: layer.{0-5}.output.dense."""
    groups: dict[tuple[Any, ...], list[SwapRow]] = defaultdict(list)
    for row in rows:
        groups[_NUMBER.sub("#", row.name), row.kind, row.bits, row.bytes_before, row.bytes_after].append(row)
    named = []
    for group in groups.values():
        numbers = list(zip(*(_NUMBER.findall(row.name) for row in group), strict=True))
        varying = [position for position, column in enumerate(numbers) if len(set(column)) > 1]
        if len(varying) > 1:  # one number is a block, two are not obvious any more
            named += [(row.name, [row]) for row in group]
            continue
        parts = _NUMBER.split(group[0].name)
        labels = [column[0] for column in numbers]
        for position in varying:
            labels[position] = _range([int(number) for number in numbers[position]])
        name = parts[0] + "".join(label + part for label, part in zip(labels, parts[1:], strict=True))
        named.append((name if not varying else f"{name} ({len(group)})", group))
    return named


def _range(numbers: Sequence[int]) -> str:
    """{0-5} for consecutive numbers, else {0,2,3}."""
    first, last = numbers[0], numbers[-1]
    consecutive = list(numbers) == list(range(first, last + 1))
    return f"{{{first}-{last}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size} B"
