"""What an engine may compute in, by the names that settings and messages use."""

from collections.abc import Mapping

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
