"""Models for `bench_engine.py`."""

import json
import os
import subprocess
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config


def make_half_billion(folder: Path, vocabulary_size: int) -> Path:
    """Random weights of Qwen2.5-0.5B's shape, bfloat16: speed does not depend on what they are."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def vocabulary_of(model: str) -> list[str]:
    """Tokens by id, as ctranslate2 names them."""
    tokenizer = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    return sorted(ids, key=lambda token: int(ids[token]))


def convert_for_ctranslate2(model: str, folder: Path, *, python: str) -> Path:
    """By ctranslate2's own converter, with this environment's transformers.

    Raises:
        CalledProcessError: it does not know the model.
    """
    program = (
        "import sys; from ctranslate2.converters import TransformersConverter as C; C(sys.argv[1]).convert(sys.argv[2], force=True)"
    )
    library = Path(torch.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(library)}
    subprocess.run([python, "-c", program, model, str(folder)], check=True, env=environment, capture_output=True)
    return folder
