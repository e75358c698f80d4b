"""Formatting, lint and types, so that one command checks everything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX_SOURCES = sorted(
    str(path)
    for folder in ("csrc", "tests", "bench")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".cpp", ".hpp", ".cu", ".cuh", ".inl")
)


def _check(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def _python_tool(name: str, *arguments: str) -> None:
    pytest.importorskip(name)
    _check(sys.executable, "-m", name, *arguments)


def test_ruff_finds_nothing() -> None:
    _python_tool("ruff", "check", ".")


def test_python_is_formatted() -> None:
    _python_tool("ruff", "format", "--check", ".")


def test_types() -> None:
    _python_tool("mypy")


def test_cxx_is_formatted() -> None:
    clang_format = pytest.importorskip("clang_format")
    _check(clang_format.get_executable("clang-format"), "--dry-run", "-Werror", *CXX_SOURCES)
