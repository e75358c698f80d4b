from collections.abc import Sequence

def isa() -> str: ...
def best_isa() -> str: ...
def max_threads() -> int: ...
def set_isa(name: str) -> None: ...
def pool_exits(
    exits: Sequence[tuple[int, int, int, Sequence[tuple[int, int]]]],
    sequences: int,
    tokens: int,
    mask: tuple[int, int, int, int, int, int] | None,
    cu_seqlens: tuple[int, int, bool] | None,
    mode: int,
    dtype: int,
    out_dtype: int,
    normalize: bool,
    threads: int,
) -> None: ...
