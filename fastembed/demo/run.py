"""The demo from text to table: what `fastembed demo` runs."""

import copy
import time
from pathlib import Path

import torch
from rich.console import Console

from ..quantization import QuantConfig
from ..swap import swap
from . import encoders, report, searches
from .corpus import build_corpus


def run(model_path: str | None, limit: int | None, threads: int | None, output: Path) -> list[report.Row]:
    """Encode the standard library with the unmodified and the swapped model, search it every way, and report.

    Args:
        model_path: folder of a sentence-transformers model; None for all-MiniLM-L6-v2 from its package.
        limit: pairs to take at most; None for all.
        threads: CPU threads; None leaves PyTorch's choice.
        output: folder for the table and the plots.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after
    except OSError as error:
        raise SystemExit(f"fastembed demo: --output must be a folder that can be written, got {output}") from error
    console = Console()
    start = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
    model = encoders.load_model(model_path)
    pairs = build_corpus(limit)
    documents, queries = [pair.document for pair in pairs], [pair.query for pair in pairs]
    console.print(f"{len(pairs)} pairs of docstring and function from the Python standard library\n")

    swapped = copy.deepcopy(model)
    swap(swapped, quantize=QuantConfig(bits=8))
    console.print()

    original, ours = encoders.encode_in_turns([model, swapped], documents, queries)
    try:
        exits = encoders.encode_exits(swapped, encoders.default_exits(model), documents, queries)
    except ValueError as error:
        console.print(f"no early exits: {error}")
        exits = {}

    rows = [
        _row("unmodified", "float", original, searches.float_search(original.documents, original.queries)),
        _row("swapped", "float", ours, searches.float_search(ours.documents, ours.queries)),
    ]
    for (layer, dim), encoded in exits.items():
        found = searches.float_search(encoded.documents, encoded.queries)
        rows.append(_row(f"swapped, exit ({layer}, {dim})", "float", encoded, found))
    for name, (alone, rescored) in (
        ("Hamming, 1 bit", searches.binary_search(ours.documents, ours.queries)),
        ("SDC, 2 bits", searches.sdc_search(ours.documents, ours.queries)),
    ):
        rows.append(_row("swapped", name, ours, alone))
        rows.append(_row("swapped", f"{name} + re-scoring", ours, rescored))

    title = (
        f"{len(pairs)} documents and as many queries, {torch.get_num_threads()} threads; docs/s, queries/s: encoded; "
        f"bytes: kept per vector; exit: (layer, dim); re-scoring: of the first {searches.CANDIDATES} by float vectors"
    )
    report.print_table(rows, title)
    for path in report.write_files(rows, title, output):
        console.print(f"wrote {path}")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    return rows


def _row(encoder: str, search: str, encoded: encoders.Encoded, found: searches.Searched) -> report.Row:
    return report.Row(
        encoder,
        search,
        encoded.documents_per_second,
        encoded.queries_per_second,
        found.queries_per_second,
        found.bytes_per_vector,
        found.quality.mrr,
        found.quality.recall_1,
        found.quality.recall_10,
    )
