"""Element types as the compiled modules number them."""

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/common/dtype.hpp
