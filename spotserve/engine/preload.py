"""Imports what a worker will need, so that processes forked afterwards start in milliseconds.

Runs no torch operation: a fork after one would inherit a thread pool without its threads.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from spotserve.config import EngineSettings
from spotserve.engine.dtypes import DTYPES
from spotserve.engine.kernels import compile_all

COMMON_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
"""What is served most, as the library names its folders."""


def compile_for(settings: EngineSettings) -> None:
    """Has the kernels compiled that a model in a local folder will need; whatever is wrong with it, its worker will say."""
    if (
        settings.kind != "native"
        or settings.device != "cpu"
        or settings.dtype not in ("float32", "bfloat16")
        or not Path(settings.model).is_dir()
    ):
        return
    try:
        config = AutoConfig.from_pretrained(settings.model).get_text_config()
        heads = config.num_attention_heads
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
    except (OSError, ValueError, KeyError, AttributeError):
        return
    compile_all(DTYPES[settings.dtype], group=group, size=size)


def preload(families: Sequence[str] = COMMON_FAMILIES) -> None:
    """Imports the engine and the library's definitions of these model families."""
    for family in families:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    importlib.import_module("spotserve.engine.bring_up")
