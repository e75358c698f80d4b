"""What was done to a model, as a value and as a table."""

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

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
        left: linear layers, and others' modules with matrices, that stay as they are: name -> why.
        bytes_before, bytes_after: of all parameters and buffers of the model, in memory.
        bytes_kept: of the original modules kept aside for `unswap`, on top of bytes_after.
    """

    rows: tuple[SwapRow, ...]
    left: dict[str, str]
    bytes_before: int
    bytes_after: int
    bytes_kept: int

    @property
    def bytes_on_disk(self) -> int:
        """Of the tensors that `fastembed.save_quantized` writes: all that the model has in memory, tied ones once."""
        return self.bytes_after

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
        by_name = {row.name: row for row in self.rows}
        kinds = {row.name: (row.kind, row.bits, row.bytes_before, row.bytes_after) for row in self.rows}
        for label, names in alike(kinds).items():
            rows = [by_name[name] for name in names]
            bits = "" if rows[0].bits is None else f"{rows[0].bits:.2f}"
            scores = (
                [_number(max((row.score for row in rows if row.score is not None), default=None))] if scored else []
            )
            error = _number(max((row.error for row in rows if row.error is not None), default=None))
            before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
            table.append([label, rows[0].kind, bits, *scores, error, _size(before), _size(after)])
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
        lines += [f"left as it is: {label} ({self.left[names[0]]})" for label, names in alike(self.left).items()]
        return "\n".join(line.rstrip() for line in lines)


def alike(kinds: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Names of one kind that differ in one number only, under one label: layer.{0-5}.output.dense (6).

    Args:
        kinds: name -> what has to be equal.
    """
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, kind in kinds.items():
        groups[_NUMBER.sub("#", name), kind].append(name)
    labelled = {}
    for group in groups.values():
        numbers = list(zip(*map(_NUMBER.findall, group), strict=True))
        varying = [position for position, column in enumerate(numbers) if len(set(column)) > 1]
        if len(varying) != 1:  # one number is a block, two are not obvious any more
            labelled.update({name: [name] for name in group})
            continue
        parts = _NUMBER.split(group[0])
        labels = [column[0] for column in numbers]
        labels[varying[0]] = _range([int(number) for number in numbers[varying[0]]])
        label = parts[0] + "".join(label + part for label, part in zip(labels, parts[1:], strict=True))
        labelled[f"{label} ({len(group)})"] = group
    return labelled


def _range(numbers: Sequence[int]) -> str:
    """{0-5} for consecutive numbers, else {0,2,3}."""
    first, last = numbers[0], numbers[-1]
    consecutive = list(numbers) == list(range(first, last + 1))
    return f"{{{first}-{last}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size} B"
