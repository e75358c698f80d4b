"""Instruction-set dispatch: the level asked for is the level used, and wide instructions stand only behind it."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from fastembed._native import core

LEVELS = ("generic", "avx2", "avx512", "avx512vnni")
# Registers that code outside a level's namespace, or below it, must not touch.
YMM_OR_ZMM = re.compile(r"%[yz]mm\d")
ZMM_OR_MASK = re.compile(r"%zmm\d|%k[0-7]\b")


def _run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def _supported() -> tuple[str, ...]:
    return LEVELS[: LEVELS.index(core.best_isa()) + 1]


@pytest.mark.parametrize("level", _supported())
def test_environment_variable_forces_the_level(level: str) -> None:
    result = _run("from fastembed._native import core; print(core.isa())", FASTEMBED_ISA=level)
    assert result.stdout.strip() == level, result.stderr


def test_unknown_level_is_refused() -> None:
    result = _run("from fastembed._native import core; core.isa()", FASTEMBED_ISA="sse9")
    assert "FASTEMBED_ISA must be generic, avx2, avx512 or avx512vnni, got sse9" in result.stderr


def test_unsupported_level_is_refused() -> None:
    if core.best_isa() == LEVELS[-1]:
        pytest.skip("this CPU has every level")
    with pytest.raises(ValueError, match="not supported by this CPU"):
        core.set_isa(LEVELS[-1])


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
def test_wide_registers_stand_only_in_their_levels_code() -> None:
    """One binary must run on every x86-64 machine: see the rules in csrc/common/isa.hpp."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", core.__file__], capture_output=True, text=True, check=True
    ).stdout
    offenders: dict[str, str] = {}
    function, forbidden = "", YMM_OR_ZMM
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
            level = next(
                (level for level in ("avx512bf16", "avx512vnni", "avx512", "avx2") if f"::{level}::" in function), None
            )
            forbidden = {None: YMM_OR_ZMM, "avx2": ZMM_OR_MASK}.get(level, re.compile(r"(?!)"))
        elif forbidden.search(line):
            offenders.setdefault(function, line.strip())
    assert not offenders, f"{len(offenders)} functions use wider registers than their level has: {offenders}"


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")
def test_no_level_has_symbols_that_the_linker_may_merge() -> None:
    """A weak symbol compiled with AVX flags could replace the baseline copy that every CPU runs."""
    symbols = subprocess.run(["nm", "-C", core.__file__], capture_output=True, text=True, check=True).stdout
    weak = [
        line for line in symbols.splitlines() if re.search(r" [WVu] ", line) and re.search(r"::avx(2|512\w*)::", line)
    ]
    assert not weak, weak
