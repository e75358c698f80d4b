from typing import TypeAlias

_Mask: TypeAlias = tuple[int, int, int, int, int, int]
_Offsets: TypeAlias = tuple[int, int, bool]
_Exit: TypeAlias = tuple[int, int, int, list[tuple[int, int]]]

def device_count() -> int: ...
def pool_exits(
    exits: list[_Exit],
    sequences: int,
    tokens: int,
    mask: _Mask | None,
    cu_seqlens: _Offsets | None,
    mode: int,
    dtype: int,
    out_dtype: int,
    normalize: bool,
    workspace: int,
    stream: int,
) -> None: ...
def pool_exits_workspace(exits: int, columns: int, sequences: int, tokens: int, packed: bool) -> int: ...
