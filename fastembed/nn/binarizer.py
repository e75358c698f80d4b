"""RecurrentBinarizer: binary and few-bit codes learned from embeddings."""

import os
import warnings
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import FLOATS, are_tensors, check_array, check_finite, check_integer
from .._safetensors import read_safetensors, write_safetensors
from ..ops.search import SDCCodes, pack_bits

Array = TypeVar("Array", np.ndarray, Tensor)

_FORMAT = "fastembed.RecurrentBinarizer"
_FORMAT_VERSION = 1
# Search takes codes of more bits; training of them has not been tried.
_MAX_BITS = 4
# What PyTorch's generators take.
MAX_SEED = 2**63 - 1
# Rows encoded at a time: bounds the memory of the hidden layer.
_ENCODE_ROWS = 8192


class RecurrentBinarizer(nn.Module):
    """Turns embeddings into codes of `bits` bits for each of `out_dims` dimensions, by recurrent binarisation.

    With f the embedding scaled to unit length, s(x) = +1 where x > 0 and else -1 (the rule of `pack_bits`), and blocks
    W, B_i, R_i of Linear, BatchNorm, ReLU, Linear:

        b = s(W(f))                                  binarise
        for i = 0 .. bits - 2:
            b = b + 2^-(i+1) s(R_i(f - |B_i(b)|))    reconstruct (|.|: to unit length), binarise the residual

    so each dimension of b is one of the 2^bits values (2 c - (2^bits - 1)) / 2^(bits - 1): the levels of
    `fastembed.sdc_encode`, searched by `fastembed.sdc_topk`. The sign has the straight-through gradient: 1 where its
    argument is within [-1, 1], else 0.

    A new module is a good quantiser already: its blocks start as (random) orthogonal maps, the identity where
    `in_features` equals `out_dims`, and its codes are then nearly those of `sdc_encode`. Training improves on them
    (`fastembed.train_binarizer`).

    Args:
        in_features: dimensions of the embeddings.
        out_dims: dimensions of the codes; None for `in_features`.
        bits: bits per dimension, 1 to 4.
        hidden_dim: width of the blocks' hidden layer; 0 makes each block a single Linear; None for twice the larger of
            `in_features` and `out_dims`. From that width on the blocks start as described, below it at random.
        seed: of the initial weights.

    Shapes:
        forward: x [N, in_features] real -> b [N, out_dims] float32.

    Raises:
        TypeError, ValueError: a setting is not as above.

    Source: Gan et al., "Binary Embedding-based Retrieval at Tencent", KDD 2023, arXiv 2302.08714, section 3.2, and its
    released code, which differs from the paper's formula in reconstructing from the sum so far.
    """

    def __init__(
        self,
        in_features: int,
        out_dims: int | None = None,
        bits: int = 2,
        hidden_dim: int | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        out_dims = in_features if out_dims is None else out_dims
        self.in_features = in_features = check_integer("in_features", in_features, 1)
        self.out_dims = out_dims = check_integer("out_dims", out_dims, 1)
        self.bits = bits = check_integer("bits", bits, 1, _MAX_BITS)
        hidden_dim = 2 * max(in_features, out_dims) if hidden_dim is None else hidden_dim
        self.hidden_dim = hidden_dim = check_integer("hidden_dim", hidden_dim, 0)
        seed = check_integer("seed", seed, 0, MAX_SEED)
        generator = torch.Generator().manual_seed(seed)
        project = _orthogonal(out_dims, in_features, generator)
        self.binarize = _Block(project, hidden_dim, generator)
        self.reconstruct = nn.ModuleList(_Block(project.T, hidden_dim, generator) for _ in range(bits - 1))
        self.residual = nn.ModuleList(_Block(project, hidden_dim, generator) for _ in range(bits - 1))

    def forward(self, x: Tensor) -> Tensor:
        self._check("x", x)
        return self._levels(x)

    @torch.no_grad()
    def encode(self, embeddings: Array, dims: int | None = None) -> SDCCodes:
        """Codes of embeddings, as of a trained module whatever its mode: batch statistics play no part.

        Args:
            embeddings: [N, in_features] real and finite; an array or a tensor. Their lengths do not matter.
            dims: keep only the first `dims` dimensions of the codes, as those of an older, narrower binariser that this
                one was trained to be compatible with; None for all.

        Returns:
            `SDCCodes` of `bits` bits and `dims` dims, of arrays or tensors as the embeddings are. With 1 bit its
            `codes` are binary codes for `hamming_topk`.

        Raises:
            TypeError: neither an array nor a tensor, or a wrong dtype.
            ValueError: a wrong shape, a NaN or infinity, or dims outside 1..out_dims.
        """
        self._check("embeddings", embeddings)
        dims = self.out_dims if dims is None else dims
        check_integer("dims", dims, 1, self.out_dims)
        device = next(self.parameters()).device
        as_tensors = isinstance(embeddings, Tensor)
        x = finite_rows("embeddings", embeddings)
        levels = [self._levels(rows.to(device), folded=True) for rows in x.split(_ENCODE_ROWS)]
        codes = pack_levels(torch.cat(levels)[:, :dims], self.bits)
        if as_tensors:
            return codes
        return SDCCodes(codes.codes.cpu().numpy(), codes.inverse_norms.cpu().numpy(), codes.bits, codes.dim)

    @torch.no_grad()
    def calibrate(self, embeddings: Tensor) -> None:
        """Set every normalisation to the mean and variance of what these embeddings, [N, in_features], send through it,
        and its affine part to undo it: in train mode, too, the module then computes what it does now."""
        f = F.normalize(embeddings.to(self.binarize.dtype))
        b = _sign(self.binarize.calibrate(f))
        for i, (reconstruct, residual) in self._rounds():
            b = b + 2.0 ** -(i + 1) * _sign(residual.calibrate(f - F.normalize(reconstruct.calibrate(b))))

    @torch.no_grad()
    def start_from(self, older: "RecurrentBinarizer") -> None:
        """Make the first `older.out_dims` dimensions of the codes those of an older binariser: its layers are copied
        into the corner of these. The other dimensions keep their weights.

        Raises:
            ValueError: the older one does not fit: other features or bits, or more dims or hidden units.
        """
        if (older.in_features, older.bits) != (self.in_features, self.bits) or older.out_dims > self.out_dims:
            raise ValueError(
                f"older must take {self.in_features} features, and have {self.bits} bits and at most "
                f"{self.out_dims} dims, got {older.in_features}, {older.bits} and {older.out_dims}"
            )
        if older.hidden_dim > self.hidden_dim or bool(older.hidden_dim) != bool(self.hidden_dim):
            raise ValueError(f"older must have a hidden_dim that fits into {self.hidden_dim}, got {older.hidden_dim}")
        for mine, theirs in zip(self._blocks(), older._blocks(), strict=True):
            mine.start_from(theirs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to one safetensors file, which holds its configuration too. An existing file is replaced
        whole or, if writing fails, left as it was."""
        write_safetensors(path, self.state_dict(), {"format": _FORMAT, "version": _FORMAT_VERSION, **self.config()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "RecurrentBinarizer":
        """The module that `save` wrote, in eval mode.

        Raises:
            ValueError: the file is not one that `save` wrote, or is damaged.
        """
        tensors, settings = read_safetensors(path)
        if settings.pop("format", None) != _FORMAT or settings.pop("version", None) != _FORMAT_VERSION:
            raise ValueError(f"path must be a file that RecurrentBinarizer.save wrote, got {os.fspath(path)}")
        try:
            module = cls(**settings)
            module.load_state_dict(tensors)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"path must be an undamaged binariser, got {os.fspath(path)}: {error}") from error
        return module.to(device).eval()

    def config(self) -> dict[str, int]:
        """What the constructor needs to make a module of the same shape."""
        return {name: getattr(self, name) for name in ("in_features", "out_dims", "bits", "hidden_dim")}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())

    def _blocks(self) -> Any:
        return [self.binarize, *self.reconstruct, *self.residual]

    def _rounds(self) -> Any:
        """Pairs of the blocks that reconstruct and binarise the residual, and their numbers."""
        return enumerate(zip(self.reconstruct, self.residual, strict=True))

    def _levels(self, x: Tensor, *, folded: bool = False) -> Tensor:
        def run(block: _Block, value: Tensor) -> Tensor:
            return block.folded(value) if folded else block(value)

        f = F.normalize(x.to(self.binarize.dtype))
        b = _sign(run(self.binarize, f))
        for i, (reconstruct, residual) in self._rounds():
            b = b + 2.0 ** -(i + 1) * _sign(run(residual, f - F.normalize(run(reconstruct, b))))
        return b

    def _check(self, name: str, x: Any) -> None:
        are_tensors(**{name: x})
        check_array(name, x, 2, FLOATS)
        if x.shape[1] != self.in_features:
            raise ValueError(f"{name} must have {self.in_features} columns, got {list(x.shape)}")


class _Block(nn.Module):
    """Linear, BatchNorm, ReLU, Linear; or one Linear. Starts as the linear map `start` where it is wide enough: the
    ReLUs of z and -z differ by z."""

    def __init__(self, start: Tensor, hidden_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = start.shape
        # Arguments of the signs then have a root mean square near 1, the width of the straight-through gradient.
        start = start * max(in_features, out_features) ** 0.5
        self.norm: nn.BatchNorm1d | None = None
        self.output: nn.Linear | None = None
        if hidden_dim == 0:
            self.linear = _linear(start)
            return
        first = _xavier(hidden_dim, in_features, generator)
        second = _xavier(out_features, hidden_dim, generator)
        if hidden_dim >= 2 * out_features:
            identity = torch.eye(out_features)
            first[: 2 * out_features] = torch.cat([start, -start])
            second = F.pad(torch.cat([identity, -identity], dim=1), (0, hidden_dim - 2 * out_features))
        self.linear = _linear(first)
        self.norm = nn.BatchNorm1d(hidden_dim)
        self.output = _linear(second)
        # The first Linear with the normalisation folded in, and of which tensors.
        self._folded: tuple[Any, Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None or self.output is None:
            return self.linear(x)
        return self.output(F.relu(self.norm(self.linear(x))))

    def folded(self, x: Tensor) -> Tensor:
        """`forward` in eval mode with one pass less: the normalisation is part of the first Linear."""
        if self.norm is None or self.output is None:
            return self.linear(x)
        return self.output(F.relu(F.linear(x, *self._fold(self.norm))))

    def calibrate(self, x: Tensor) -> Tensor:
        """See `RecurrentBinarizer.calibrate`; returns what the block makes of x."""
        if self.norm is None:
            return self.linear(x)
        hidden = self.linear(x)
        var, mean = torch.var_mean(hidden, dim=0, unbiased=False)
        for target, value in (
            (self.norm.running_mean, mean),
            (self.norm.running_var, var),
            (self.norm.bias, mean),
            (self.norm.weight, (var + self.norm.eps).sqrt()),
        ):
            target.copy_(value)  # type: ignore[union-attr]
        return self.folded(x)

    def start_from(self, older: "_Block") -> None:
        """See `RecurrentBinarizer.start_from`."""
        _copy_into_corner(older.linear, self.linear)
        if self.norm is not None and older.norm is not None and self.output is not None and older.output is not None:
            _copy_into_corner(older.output, self.output)
            for name in ("weight", "bias", "running_mean", "running_var"):
                source = getattr(older.norm, name)
                getattr(self.norm, name)[: len(source)].copy_(source)

    def _fold(self, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
        """Weight and bias, kept until one of the tensors they come from changes."""
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        sources = (self.linear.weight, self.linear.bias, norm.weight, norm.bias, mean, var)
        # Inference tensors do not count their changes.
        key = None if any(t.is_inference() for t in sources) else [(t.data_ptr(), t._version) for t in sources]
        if key is None or self._folded is None or self._folded[0] != key:
            scale = norm.weight / (var + norm.eps).sqrt()
            weight, bias = self.linear.weight * scale[:, None], (self.linear.bias - mean) * scale + norm.bias
            self._folded = (key, weight.detach(), bias.detach())
        return self._folded[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_folded": None}


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad, 0.0)


def _sign(x: Tensor) -> Tensor:
    return _Sign.apply(x)


def pack_levels(levels: Tensor, bits: int) -> SDCCodes:
    """The codes of levels (2 c - (2^bits - 1)) / 2^(bits - 1), [N, D], as `SDCCodes` holds them."""
    odd = (levels * 2 ** (bits - 1)).round()
    c = (odd + 2**bits - 1).to(torch.int32) >> 1
    planes = [pack_bits((c >> shift & 1).float()) for shift in reversed(range(bits))]
    inverse_norms = (1 / odd.double().square().sum(dim=1).sqrt()).float()
    return SDCCodes(torch.cat(planes, dim=1), inverse_norms, bits, levels.shape[1])


def finite_rows(name: str, x: Any) -> Tensor:
    """Real vectors [N, D], an array or a tensor, as a tensor without gradient; ValueError naming the first row with a
    NaN or infinity."""
    are_tensors(**{name: x})
    check_array(name, x, 2, FLOATS)
    if isinstance(x, Tensor):
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got a tensor of layout {x.layout}")
        tensor = x.detach()
    else:
        with warnings.catch_warnings():
            # Of an array that must not be written, such as a file mapped for reading. It is not.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(np.ascontiguousarray(x))
    check_finite(tensor, name)
    return tensor


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.zero_()
    return linear


def _copy_into_corner(source: nn.Linear, target: nn.Linear) -> None:
    """The first outputs of `target` become those of `source`, whatever its further inputs are."""
    rows, columns = source.weight.shape
    target.weight[:rows].zero_()
    target.weight[:rows, :columns].copy_(source.weight)
    target.bias[:rows].copy_(source.bias)


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows or columns, whichever are fewer; the identity where the matrix is square."""
    if rows == columns:
        return torch.eye(rows)
    return nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)


def _xavier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return nn.init.xavier_normal_(torch.empty(rows, columns), generator=generator)
