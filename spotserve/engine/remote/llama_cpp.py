"""llama.cpp's own `/completion` (facts from `tools/server/README.md` and `server-context.cpp`)."""

from typing import Any

import msgspec

from spotserve.engine.remote.dialect import Ask, Body, Piece
from spotserve.engine.remote.reading import decode, error_of, finish_reason

_ANY_SEED = 2**32 - 1
"""Seeds have 32 bits there, and this one means: any."""


class _LlamaCppEvent(msgspec.Struct):
    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    stop_type: str | None = None
    error: Any = None


class LlamaCppDialect:
    """Ids in and out.

    A token that ends inside a character gets no event of its own: the event that completes the character has the text of all
    and the id of the last. Presence and frequency penalties count the prompt there, and `min_tokens` does not exist.
    """

    name = "llama.cpp"
    path = "/completion"
    health_path = "/health"
    takes_token_ids = True
    omits_split_characters = True
    parameters = frozenset({"top_k", "min_p", "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos"})

    def body(self, ask: Ask) -> Body:
        """Every default that is not neutral is overruled, and cuts come after temperature as everywhere else."""
        sampling = ask.sampling
        return {
            "prompt": list(ask.token_ids),
            "stream": True,
            "return_tokens": True,
            "n_predict": ask.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "typical_p": 1.0,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": -1,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "dry_multiplier": 0.0,
            "xtc_probability": 0.0,
            "mirostat": 0,
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "seed": ask.seed % _ANY_SEED,
            "ignore_eos": sampling.ignore_eos,
            "logit_bias": [[token_id, bias] for token_id, bias in sampling.logit_bias.items()],
        }

    def read(self, data: bytes) -> Piece:
        """One token, or the end."""
        event = decode(data, _LlamaCppEvent)
        if event.error is not None:
            raise error_of(event.error)
        if event.stop:  # repeats nothing when streaming
            return Piece(token_ids=(), finish_reason=finish_reason(event.stop_type or ""))
        return Piece(text=event.content, token_ids=tuple(event.tokens))
