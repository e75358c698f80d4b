"""The command line: `fastembed info`."""

import argparse
from collections.abc import Sequence

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

    command = commands.add_parser("info", help="what this installation can use, and why not the rest")
    command.set_defaults(run=lambda options: print(info()))
    return parser
