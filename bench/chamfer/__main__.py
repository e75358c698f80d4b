"""`python -m bench.chamfer`: encodes the demo's corpus and writes the table to bench/results/."""

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastembed.demo.corpus import build_corpus
from fastembed.demo.encoders import load_model

from .. import RESULTS
from . import DEPTHS, Row, chamfer, table
from . import __doc__ as method


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chamfer", description=__doc__)
    parser.add_argument("--limit", type=int, default=500, help="pairs of the corpus")
    arguments = parser.parse_args()
    pairs = build_corpus(arguments.limit)
    model = load_model(None)
    queries = _unit_tokens(model, [pair.query for pair in pairs])
    documents = _unit_tokens(model, [pair.document for pair in pairs])
    text = _markdown(list(table(queries, documents, chamfer(queries, documents))), len(pairs))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "chamfer.md").write_text(text)
    print(text)


def _unit_tokens(model: Any, texts: list[str]) -> list[Tensor]:
    with torch.inference_mode():
        tokens = model.encode(texts, output_value="token_embeddings", show_progress_bar=True)
    return [F.normalize(sequence.float(), dim=1) for sequence in tokens]


def _markdown(rows: list[Row], pairs: int) -> str:
    lines = [
        "# chamfer",
        "",
        str(method).strip(),
        "",
        f"{pairs} queries, {pairs} documents. Written by `python -m bench.chamfer`.",
        "",
        f"| repetitions | bits | projection_dim | dims | epsilon | above | error | "
        f"{' | '.join(f'recall@{n}' for n in DEPTHS)} |",
        f"|{'---:|' * (7 + len(DEPTHS))}",
    ]
    lines += [
        f"| {row.repetitions} | {row.bits} | {row.projection_dim or 'all'} | {row.dims} | {row.epsilon:.3f} | "
        f"{row.above:.3f} | {row.error:.4f} | "
        f"{' | '.join(f'{recall:.3f}' for recall in row.recall)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
