"""TGI's own `/generate_stream` (facts from `docs/openapi.json` and `router/src/lib.rs` of text-generation-inference)."""

from typing import Any

import msgspec

from spotserve.engine.remote.dialect import Ask, Body, Piece
from spotserve.engine.remote.reading import decode, error_of, finish_reason


class _TgiToken(msgspec.Struct):
    id: int
    text: str = ""


class _TgiDetails(msgspec.Struct):
    finish_reason: str


class _TgiEvent(msgspec.Struct):
    token: _TgiToken | None = None
    details: _TgiDetails | None = None
    error: Any = None


class TgiDialect:
    """Text in, ids out."""

    name = "tgi"
    path = "/generate_stream"
    health_path = "/health"
    takes_token_ids = False
    omits_split_characters = False
    parameters = frozenset({"top_k", "repetition_penalty", "stop_token_ids"})

    def body(self, ask: Ask) -> Body:
        """What is off has to be left out: TGI refuses neutral values."""
        sampling = ask.sampling
        parameters: Body = {"max_new_tokens": ask.max_tokens, "do_sample": sampling.temperature > 0, "details": True}
        if sampling.temperature > 0:
            parameters |= {"temperature": sampling.temperature, "seed": max(1, ask.seed)}
            parameters |= {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
            parameters |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        if sampling.repetition_penalty != 1:
            parameters["repetition_penalty"] = sampling.repetition_penalty
        return {"inputs": ask.text, "parameters": parameters}

    def read(self, data: bytes) -> Piece:
        """One token; the last one comes with the reason of the end."""
        event = decode(data, _TgiEvent)
        if event.error is not None:
            raise error_of(event.error)
        return Piece(
            text=event.token.text if event.token else "",
            token_ids=(event.token.id,) if event.token else (),
            finish_reason=finish_reason(event.details.finish_reason if event.details else None),
        )
