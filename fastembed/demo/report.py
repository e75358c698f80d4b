"""The demo's table, on the terminal and in files, and its two plots."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # the plots go to files; no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One way from text to answers.

    Attributes:
        encoder, search: what encodes and what searches.
        documents_per_second, queries_per_second: of encoding.
        searches_per_second: queries answered from vectors already encoded.
        bytes_per_vector: kept for each document, the float vectors for re-scoring included.
        mrr_10, recall_1, recall_10: in [0, 1].
    """

    encoder: str
    search: str
    documents_per_second: float
    queries_per_second: float
    searches_per_second: float
    bytes_per_vector: int
    mrr_10: float
    recall_1: float
    recall_10: float


_HEADINGS = ("encoder", "search", "docs/s", "queries/s", "searches/s", "bytes", "MRR@10", "R@1", "R@10")


def print_table(rows: Sequence[Row], title: str) -> None:
    """The table on the terminal; the first row is the unmodified model that the others are compared with."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for position, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if position < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, rows[0], separator="\n"), end_section=True)
    console = Console()
    # On a narrower terminal better lines that wrap than cells cut short.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)


def write_files(rows: Sequence[Row], title: str, folder: Path) -> list[Path]:
    """Write table.md, table.csv, quality_vs_bytes.png and quality_vs_speed.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("table.md", "table.csv", "quality_vs_bytes.png", "quality_vs_speed.png")]
    paths[0].write_text(_markdown(rows, title))
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    _plot_bytes(rows, paths[2])
    _plot_speed(rows, paths[3])
    return paths


def _cells(row: Row, base: Row, separator: str) -> list[str]:
    """Speeds with their ratio to the first row's, quality in percent with its difference."""

    def speed(value: float, of: float) -> str:
        return f"{value:,.0f}{separator}({value / of:.2f}x)"

    def percent(value: float, of: float) -> str:
        return f"{100 * value:.1f}{separator}({100 * (value - of):+.1f})"

    return [
        row.encoder,
        row.search,
        speed(row.documents_per_second, base.documents_per_second),
        speed(row.queries_per_second, base.queries_per_second),
        speed(row.searches_per_second, base.searches_per_second),
        f"{row.bytes_per_vector:,}",
        percent(row.mrr_10, base.mrr_10),
        percent(row.recall_1, base.recall_1),
        percent(row.recall_10, base.recall_10),
    ]


def _markdown(rows: Sequence[Row], title: str) -> str:
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---|---|" + "---:|" * (len(_HEADINGS) - 2)]
    lines += ["| " + " | ".join(_cells(row, rows[0], separator=" ")) + " |" for row in rows]
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def _plot_bytes(rows: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    _scatter(axes, rows, lambda row: row.bytes_per_vector, lambda row: f"{row.encoder}, {row.search}")
    axes.set_xlabel("bytes per vector")
    axes.set_title("Quality against bytes kept per document")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_speed(rows: Sequence[Row], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    _scatter(
        left,
        [row for row in rows if row.search == "float"],
        lambda row: row.documents_per_second,
        lambda row: row.encoder,
    )
    left.set_xlabel("documents encoded per second")
    left.set_title("Quality against encoding speed")
    _scatter(right, rows, lambda row: row.searches_per_second, lambda row: f"{row.encoder}, {row.search}")
    right.set_xlabel("queries answered per second")
    right.set_title("Quality against search speed")
    right.set_ylabel("")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _scatter(axes: Axes, rows: Sequence[Row], x: Callable[[Row], float], label: Callable[[Row], str]) -> None:
    for index, row in enumerate(rows):
        axes.scatter(x(row), 100 * row.mrr_10, s=60, color=f"C{index}", label=label(row), zorder=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("MRR@10, percent")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
