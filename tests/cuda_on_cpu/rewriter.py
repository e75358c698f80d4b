"""Rewrites the CUDA syntax that g++ cannot parse: launches, `__shared__` and `extern __shared__` declarations.

    kernel<T><<<grid, block, shared, stream>>>(a, b)   ->  ::cuda_on_cpu::launch("kernel<T>", {grid, block, ...}, ...)
    __shared__ float part[4][32];                      ->  a reference to the block's own copy
    extern __shared__ float tile[];                    ->  a pointer to the block's dynamic shared memory

Everything else is C++ already, once shim/device.hpp has been included. Line numbers stay as they are, so that errors
and sanitizer reports name the lines of the .cu file.
"""

import re
from pathlib import Path

_ALIGNMENT = r"(?:(?:__align__|alignas)\s*\([^)]*\)\s*)?"
_EXTERN_SHARED = re.compile(rf"extern\s+__shared__\s+{_ALIGNMENT}(?P<type>[\w:\s]+?)\s+(?P<name>\w+)\s*\[\s*\]\s*;")
_SHARED = re.compile(
    rf"__shared__\s+{_ALIGNMENT}"
    r"(?P<type>(?:(?:unsigned|const|volatile|typename)\s+)*[\w:]+(?:<[^;<>]*>)?(?:::\w+)*)\s+(?P<names>[^;=]+);"
)
_DECLARATOR = re.compile(r"\s*(?P<name>\w+)\s*(?P<extents>(?:\[[^\]]*\]\s*)*)$")
# Comments and literals, which must not be touched.
_OPAQUE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)


class RewriteError(ValueError):
    """CUDA syntax that this rewriter does not understand."""


def rewrite_file(source: Path, shown_as: str) -> str:
    """The C++ of a .cu or .cuh file; `shown_as` is its name in messages."""
    return f'#line 1 "{shown_as}"\n{rewrite(source.read_text())}'


def rewrite(source: str) -> str:
    """The C++ of CUDA source text."""
    code, opaque = _hide_opaque(source)
    code = _EXTERN_SHARED.sub(_dynamic_shared, code)
    code = _SHARED.sub(_static_shared, code)
    if leftover := re.search(r"[^\n]*\b__shared__\b[^\n]*", code):
        raise RewriteError(f"__shared__ declaration not understood: {leftover.group().strip()}")
    return _show_opaque(_rewrite_launches(code), opaque)


def _hide_opaque(source: str) -> tuple[str, list[str]]:
    opaque: list[str] = []

    def hide(match: re.Match[str]) -> str:
        opaque.append(match.group())
        return f"\x00{len(opaque) - 1}\x00"

    return _OPAQUE.sub(hide, source), opaque


def _show_opaque(code: str, opaque: list[str]) -> str:
    return re.sub("\x00(\\d+)\x00", lambda match: opaque[int(match.group(1))], code)


def _dynamic_shared(match: re.Match[str]) -> str:
    kind = match["type"].strip()
    return f"{kind}* const {match['name']} = static_cast<{kind}*>(::cuda_on_cpu::dynamic_shared());"


def _static_shared(match: re.Match[str]) -> str:
    statements = []
    for declarator in _split(match["names"], ","):
        parts = _DECLARATOR.match(declarator)
        if parts is None:
            raise RewriteError(f"__shared__ declaration not understood: {match.group()}")
        name, extents = parts["name"], "".join(parts["extents"].split())
        statements.append(
            f"struct {name}_tag; using {name}_type = {match['type'].strip()}{extents}; "
            f"{name}_type& {name} = ::cuda_on_cpu::shared<{name}_type, {name}_tag>();"
        )
    return " ".join(statements) + "\n" * match.group().count("\n")


def _rewrite_launches(code: str) -> str:
    rewritten, position = "", 0
    while (chevrons := code.find("<<<", position)) >= 0:
        start = _kernel_start(code, chevrons)
        configuration_end = code.find(">>>", chevrons)
        if configuration_end < 0:
            raise RewriteError(f"launch without >>>: {code[start : chevrons + 40]}")
        opening = code.find("(", configuration_end)
        if opening < 0 or code[configuration_end + 3 : opening].strip():
            raise RewriteError(f"launch without arguments: {code[start : configuration_end + 40]}")
        closing = _closing_bracket(code, opening)
        kernel = code[start:chevrons].strip()
        configuration = code[chevrons + 3 : configuration_end]
        arguments = code[opening + 1 : closing]
        separator = ", " if arguments.strip() else ""
        rewritten += (
            f"{code[position:start]}::cuda_on_cpu::launch("
            f'"{" ".join(kernel.split())}", ::cuda_on_cpu::Configuration{{{configuration}}}, '
            f"{kernel}{separator}{arguments})"
        )
        position = closing + 1
    return rewritten + code[position:]


def _kernel_start(code: str, chevrons: int) -> int:
    """Where the kernel's name begins, template arguments included."""
    start = len(code[:chevrons].rstrip())
    if code[start - 1] == ">":
        depth = 0
        while True:
            start -= 1
            depth += (code[start] == ">") - (code[start] == "<")
            if depth == 0:
                break
        start = len(code[:start].rstrip())
    while start and (code[start - 1].isalnum() or code[start - 1] in "_:"):
        start -= 1
    return start


def _closing_bracket(code: str, opening: int) -> int:
    depth = 0
    for position in range(opening, len(code)):
        depth += (code[position] in "([{") - (code[position] in ")]}")
        if depth == 0:
            return position
    raise RewriteError(f"unbalanced brackets: {code[opening : opening + 40]}")


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces
