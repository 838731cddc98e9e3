"""This engine, in a process of its own as every peer."""

import json

from loop import Round, answer_rounds, peer_arguments

from spotserve.bench.engine import PROMPT_TOKENS, run_round
from spotserve.config import EngineSettings
from spotserve.engine.bring_up import lone_engine


def start() -> tuple[str, Round]:
    """One engine, speculation off unless `--further` says otherwise."""
    arguments = peer_arguments()
    settings: dict[str, object] = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "max_batch": arguments.max_batch,
        "max_step_tokens": max(256, arguments.max_batch),
        "kv_tokens": max(4096, arguments.max_batch * (PROMPT_TOKENS + 192)),
        "prefix_cache": False,
        "speculation": "off",
        **json.loads(arguments.further),
    }
    engine = lone_engine(EngineSettings.model_validate(settings))
    return "this repository", lambda prompts, new_tokens: run_round(engine, prompts, new_tokens)


if __name__ == "__main__":
    answer_rounds(start)
