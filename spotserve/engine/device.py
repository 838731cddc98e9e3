"""What a rank computes on, and how numbers get there.

A CUDA device works through its queue while the processor runs ahead and fills it; whoever waits for a transfer lets it run dry.
What goes to the device is therefore put in pinned memory and queued like any other work, and a step waits once: for its tokens.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError

PROCESSOR = torch.device("cpu")


def device_of(settings: EngineSettings) -> torch.device:
    """What `settings.device` names.

    Raises:
        ModelError: this process has no such device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"{settings.model_name}: device 'cuda' is asked for, but torch {torch.__version__} finds no CUDA device here: "
            "set engine.device to 'cpu', or install a torch that is built for CUDA on a machine with a GPU and its driver, "
            "and let CUDA_VISIBLE_DEVICES name it"
        )
    return torch.device(settings.device)


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Numbers as a tensor [len(values)]; nobody waits for the transfer."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays of int64 as tensors: the same memory on a processor, one transfer for all elsewhere, for which nobody waits."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return apart(packed(arrays).to(device, non_blocking=True), arrays)


def packed(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Arrays of int64 one after the other, in pinned memory."""
    return torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays])).pin_memory()


def apart(values: torch.Tensor, like: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Views of what was packed, in the shapes of `like`."""
    ends = accumulate(array.size for array in like)
    return [values[end - array.size : end].view(array.shape) for array, end in zip(like, ends, strict=True)]
