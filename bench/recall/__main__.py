"""`python -m bench.recall`: encodes the demo's corpus, trains on half of it and writes the table to bench/results/."""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fastembed.demo.corpus import build_corpus
from fastembed.demo.encoders import encode_in_turns, load_model

from .. import RESULTS
from . import CANDIDATES, Row, table
from . import __doc__ as method


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--embeddings", type=Path, help="npz file to keep the corpus embeddings in, or take them from")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    queries, documents = _embeddings(arguments.embeddings)
    rows = table(queries, documents)
    text = _markdown(rows, len(queries))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recall.md").write_text(text)
    with (RESULTS / "recall.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    print(text)


def _embeddings(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if path is not None and path.exists():
        with np.load(path) as kept:
            return kept["queries"], kept["documents"]
    pairs = build_corpus()
    (encoded,) = encode_in_turns([load_model(None)], [p.document for p in pairs], [p.query for p in pairs])
    if path is not None:
        np.savez(path, queries=encoded.queries, documents=encoded.documents)
    return encoded.queries, encoded.documents


def _markdown(rows: list[Row], pairs: int) -> str:
    lines = [
        "# recall",
        "",
        str(method).strip(),
        "",
        f"{pairs} pairs, all-MiniLM-L6-v2, {pairs - pairs // 2} held-out queries over {pairs} documents. labelled: "
        f"right document among the first 10; relative: to float32; overlap: with the first 10 of float32; "
        f"re-scored: the first {CANDIDATES} by float vectors. Written by `python -m bench.recall`.",
        "",
        "| method | bytes | labelled | relative | overlap |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.method} | {row.stored_bytes} | {row.labelled:.4f} | {row.relative:.4f} | {row.overlap:.4f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
