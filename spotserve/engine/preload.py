"""Imports what a worker will need, so that processes forked afterwards start in milliseconds.

Runs no torch operation: a fork after one would inherit a thread pool without its threads.
"""

import importlib
from collections.abc import Sequence

COMMON_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
"""What is served most, as the library names its folders."""


def preload(families: Sequence[str] = COMMON_FAMILIES) -> None:
    """Imports the engine and the library's definitions of these model families."""
    for family in families:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    importlib.import_module("spotserve.engine.engine")
