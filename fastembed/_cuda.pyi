from typing import TypeAlias

_Mask: TypeAlias = tuple[int, int, int, int, int, int]
_Offsets: TypeAlias = tuple[int, int, bool]
_Exit: TypeAlias = tuple[int, int, int, list[tuple[int, int]]]
_State: TypeAlias = tuple[int, int]
_ExitGradient: TypeAlias = tuple[int, int, _State, list[tuple[int, int]]]

architectures: list[int]
latent_rows_16_bit: int
latent_rows_float32: int
latent_forward_columns: int
latent_backward_columns: int

def device_count() -> int: ...
def latent_attention(
    dtype: int,
    sizes: list[int],
    query: list[int],
    key: list[int],
    value: list[int],
    keep: list[int],
    scale: float,
    out: int,
    lse: int,
    stream: int,
) -> None: ...
def latent_attention_backward(
    dtype: int,
    sizes: list[int],
    query: list[int],
    key: list[int],
    value: list[int],
    keep: list[int],
    scale: float,
    grad: list[int],
    lse: int,
    deltas: int,
    query_grad: int,
    key_grad: int,
    value_grad: int,
    stream: int,
) -> None: ...
def latent_attend_folded(
    dtype: int,
    sizes: list[int],
    query: list[int],
    key: list[int],
    value: list[int],
    keep: list[int],
    scale: float,
    bias: int,
    heads_each: int,
    out: int,
    stream: int,
) -> None: ...
def latent_gated_means(
    dtype: int,
    values: int,
    gates: int,
    stride: int,
    value_bias: int,
    gate_bias: int,
    tokens: int,
    features: int,
    offsets: int,
    sequences: int,
    means: int,
    means_stride: int,
    stream: int,
) -> None: ...
def pool_exits(
    exits: list[_Exit],
    sequences: int,
    tokens: int,
    mask: _Mask | None,
    cu_seqlens: _Offsets | None,
    mode: int,
    dtype: int,
    out_type: int,
    normalize: bool,
    states: list[_State],
    workspace: int,
    stream: int,
) -> None: ...
def pool_exits_workspace(exits: int, columns: int, sequences: int, tokens: int, packed: bool) -> int: ...
def pool_exits_backward(
    exits: list[_ExitGradient],
    sequences: int,
    tokens: int,
    mask: _Mask | None,
    cu_seqlens: _Offsets | None,
    mode: int,
    dtype: int,
    prefix_dtype: int,
    normalize: bool,
    workspace: int,
    stream: int,
) -> None: ...
def pool_exits_backward_workspace(columns_of_all_exits: int, sequences: int) -> int: ...
