"""Instruction-set dispatch: the level asked for is the level used, and wide instructions stand only behind it."""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest

from fastembed._native import core

LEVELS = ("generic", "avx2", "avxvnni", "avx512", "avx512vnni")
# Registers that code outside a level's namespace, or below it, must not touch.
YMM_OR_ZMM = re.compile(r"%[yz]mm\d")
ZMM_OR_MASK = re.compile(r"%zmm\d|%k[0-7]\b")


def _isa_of_a_process(wanted: str) -> subprocess.CompletedProcess[str]:
    without_torch = "import sys; sys.modules['torch'] = None"  # starts sooner
    code = f"{without_torch}; from fastembed._native import core; print(core.isa())"
    env = {**os.environ, "FASTEMBED_ISA": wanted}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def listing() -> list[str]:
    """The core's machine code, a line for each instruction and one with its name before each function."""
    if shutil.which("objdump") is None:
        pytest.skip("binutils is not installed")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", core.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("level", core.isa_levels())
def test_environment_variable_forces_the_level(level: str) -> None:
    result = _isa_of_a_process(level)
    assert result.stdout.strip() == level, result.stderr


def test_unknown_level_is_refused() -> None:
    result = _isa_of_a_process("sse9")
    assert "FASTEMBED_ISA must be generic, avx2, avxvnni, avx512 or avx512vnni, got sse9" in result.stderr


def test_unsupported_level_is_refused() -> None:
    unsupported = [level for level in LEVELS if level not in core.isa_levels()]
    if not unsupported:
        pytest.skip("this CPU has every level")
    for level in unsupported:
        with pytest.raises(ValueError, match=f"{level} is not supported by this CPU"):
            core.set_isa(level)


def test_the_best_level_is_a_supported_one() -> None:
    assert set(core.isa_levels()) <= set(LEVELS)
    assert core.best_isa() in core.isa_levels()


def test_wide_registers_stand_only_in_their_levels_code(listing: list[str]) -> None:
    """One binary must run on every x86-64 machine: see the rules in csrc/common/isa.hpp."""
    offenders: dict[str, str] = {}
    function, forbidden = "", YMM_OR_ZMM
    for line in listing:
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
            level = next((level for level in ("avx512bf16", *reversed(LEVELS)) if f"::{level}::" in function), None)
            forbidden = {None: YMM_OR_ZMM, "generic": YMM_OR_ZMM, "avx2": ZMM_OR_MASK, "avxvnni": ZMM_OR_MASK}.get(
                level, re.compile(r"(?!)")
            )
        elif forbidden.search(line):
            offenders.setdefault(function, line.strip())
    assert not offenders, f"{len(offenders)} functions use wider registers than their level has: {offenders}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
def test_byte_products_stand_in_the_encoding_of_their_level(listing: list[str]) -> None:
    """AVX-VNNI and AVX-512 VNNI have one instruction in two encodings, and few CPUs have both."""
    encodings: dict[str, set[str]] = {}
    function = ""
    for line in listing:
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
        elif "vpdpbusd" in line:
            level = next(level for level in reversed(LEVELS) if f"::{level}::" in function)
            encodings.setdefault(level, set()).add("VEX" if "{vex}" in line else "EVEX")
    assert encodings == {"avxvnni": {"VEX"}, "avx512vnni": {"EVEX"}}


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")
def test_no_level_has_symbols_that_the_linker_may_merge() -> None:
    """A weak symbol compiled with AVX flags could replace the baseline copy that every CPU runs."""
    symbols = subprocess.run(["nm", "-C", core.__file__], capture_output=True, text=True, check=True).stdout
    weak = [
        line
        for line in symbols.splitlines()
        if re.search(r" [WVu] ", line) and re.search(r"::avx(2|vnni|512\w*)::", line)
    ]
    assert not weak, weak
