"""A tiny model with random weights, loaded by real engines."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from worker_scene import VOCABULARY_SIZE


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers that has grouped heads; its logits are wide enough to be no tie."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=[1, 2],
    )
    folder = tmp_path_factory.mktemp("models") / "worker-llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
