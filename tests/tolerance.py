"""The rule for floating-point agreement: derived from what PyTorch itself loses in the same dtype, never picked.

`oracle` is the reference computed in float64 from the very inputs the kernel got. The kernel's largest error may be
`factor` times the largest error of PyTorch's own computation in the inputs' dtype (2 forward, 3 backward), plus one
rounding of the output dtype, and never more than a ceiling per dtype relative to the oracle's magnitude.
"""

import torch
from torch import Tensor

CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close_to_oracle(ours: Tensor, torch_same_dtype: Tensor, oracle: Tensor, *, factor: float = 2.0) -> None:
    """Raise AssertionError, with the figures, when `ours` errs more than the rule above allows.

    Where the oracle is NaN or infinite, ours must be the same; such places are left out of the error.
    """
    assert ours.shape == oracle.shape
    assert oracle.dtype == torch.float64
    finite = oracle.isfinite()
    torch.testing.assert_close(ours.double()[~finite], oracle[~finite], equal_nan=True, rtol=0, atol=0)
    if not finite.any():
        return
    scale = oracle[finite].abs().max().item()
    error = (ours.double() - oracle)[finite].abs().max().item()
    theirs = (torch_same_dtype.double() - oracle)[finite].abs().nan_to_num(posinf=float("inf")).max().item()
    rounding = torch.finfo(ours.dtype).eps * scale + torch.finfo(ours.dtype).smallest_normal
    allowed = min(factor * theirs + rounding, CEILING[ours.dtype] * scale + rounding)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} (PyTorch's own {theirs:.3e}, scale {scale:.3e})"
