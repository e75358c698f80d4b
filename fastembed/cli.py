"""The command line: `fastembed demo` and `fastembed info`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from . import __version__, info


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (default: the process's) name; exit with a message on wrong input."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastembed", description="Fast kernels for text-embedding models on CPU, CUDA and Triton."
    )
    parser.add_argument("--version", action="version", version=f"fastembed-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="encode and search a real corpus with a swapped encoder, and compare")
    command.add_argument("--model", metavar="PATH", help="a saved model's folder (default: all-MiniLM-L6-v2)")
    command.add_argument("--limit", type=_positive, help="documents to take at most (default: all, about 4,000)")
    command.add_argument("--threads", type=_positive, help="CPU threads (default: one per core)")
    command.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the table and plots")
    command.set_defaults(run=_demo)

    command = commands.add_parser("info", help="what this installation can use, and why not the rest")
    command.set_defaults(run=lambda options: print(info()))
    return parser


def _demo(options: argparse.Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the demo's imports load huggingface_hub
    try:
        from .demo.run import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__:
            raise
        raise SystemExit(f"fastembed demo needs {error.name}: pip install 'fastembed-kernels[demo]'") from error
    run(options.model, options.limit, options.threads, options.output)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value
