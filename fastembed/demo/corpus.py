"""A real corpus that every machine has: the functions of the Python standard library and what is said of them."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Folders that are not the library itself: installed packages, tests, and data for tests.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_SHORTEST_QUERY = 20  # characters: "Return self." describes nothing
_ORDER_SEED = 0


@dataclass(frozen=True)
class Pair:
    """A query and the one document that answers it.

    Attributes:
        query: the first paragraph of a function's docstring.
        document: the function's source without the docstring.
    """

    query: str
    document: str


def build_corpus(limit: int | None = None, root: Path | None = None) -> list[Pair]:
    """The pairs of a Python source tree, in an order that is the same on every run and mixes the modules.

    Args:
        limit: how many pairs to take at most; None for all.
        root: the source tree; None for the standard library that runs this.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    pairs: dict[str, Pair] = {}
    documents: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            for pair in _pairs_of_file(path):
                # A text that stands twice would have two right answers.
                if pair.query not in pairs and pair.document not in documents:
                    pairs[pair.query] = pair
                    documents.add(pair.document)
    corpus = list(pairs.values())
    random.Random(_ORDER_SEED).shuffle(corpus)
    return corpus[:limit]


def _pairs_of_file(path: Path) -> Iterator[Pair]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):  # the library keeps a few broken files, to test tools on
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        if node.name.startswith("_"):  # written for its module's maintainers, not for whoever searches
            continue
        query = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        if len(query) >= _SHORTEST_QUERY:
            yield Pair(query, _source_without_docstring(node, lines))


def _source_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    indent = " " * node.col_offset
    return "\n".join(line.removeprefix(indent) for line in kept)
