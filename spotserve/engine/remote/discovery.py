"""Who a server is: its dialect, its name for the model, and how long a context it serves. Asked once, when an engine is opened."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from spotserve.config import EngineSettings
from spotserve.core.errors import InvalidRequest, ModelError, Overloaded, PeerLost, WireError
from spotserve.engine.remote.completions import PlainDialect, SglangDialect, SpotServeDialect, VllmDialect
from spotserve.engine.remote.dialect import Dialect
from spotserve.engine.remote.llama_cpp import LlamaCppDialect
from spotserve.engine.remote.tgi import TgiDialect
from spotserve.engine.remote.upstream import Patience, Upstream
from spotserve.engine.remote.vocabulary import Vocabulary

RETRY_S = 0.25

_PROBE = "Once upon a time 42 clocks stood still, and nobody knew why."
"""Plain words: every tokenizer gives them back as they are."""

BY_OWNER: Mapping[str, Dialect] = {
    "vllm": VllmDialect(),
    "sglang": SglangDialect(),
    "llamacpp": LlamaCppDialect(),
    "spotserve": SpotServeDialect(),
}
"""Dialects by what `/v1/models` has in `owned_by`."""


@dataclass(frozen=True, slots=True)
class Server:
    """What is known of a server."""

    dialect: Dialect
    model: str
    """Its name for the model."""
    context_tokens: int | None
    """Longest prompt and output together; None: it does not say."""


async def discover(upstream: Upstream, settings: EngineSettings, patience: Patience) -> Server:
    """Waits until a server is up, then asks it.

    Raises:
        PeerLost: it did not come up in time.
        ModelError: it is no server of this kind, refuses the key, or does not serve the model.
    """
    deadline_s = monotonic() + patience.start_s
    while True:
        try:
            return await _ask(upstream, settings)
        except (Overloaded, WireError) as error:
            if monotonic() > deadline_s:
                raise PeerLost(f"no model server answers at {upstream.name}: {error}") from error
        except ModelError as error:
            raise ModelError(f"{upstream.name}: {error}") from error
        await asyncio.sleep(RETRY_S)


async def check_vocabulary(upstream: Upstream, server: Server, vocabulary: Vocabulary, settings: EngineSettings) -> None:
    """Has a text tokenised there and reads the ids here; servers that do not offer that are taken at their word.

    Raises:
        ModelError: the ids say something else here: the server has another model's tokenizer.
    """
    body = {"model": server.model, "prompt": _PROBE, "content": _PROBE, "add_special_tokens": False, "add_special": False}
    try:
        answer = await upstream.ask("/tokenize", body)
    except (InvalidRequest, ModelError, Overloaded, WireError):
        return
    token_ids = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(token_ids, list) or not all(isinstance(token_id, int) for token_id in token_ids):
        return
    if max(token_ids, default=0) >= vocabulary.size or vocabulary.decode(token_ids).strip() != _PROBE:
        raise ModelError(
            f"{upstream.name} serves {server.model} with another tokenizer than that of {settings.model}; "
            "--model has to name the model that the server runs"
        )


async def _ask(upstream: Upstream, settings: EngineSettings) -> Server:
    tgi = await _tgi(upstream)
    if tgi is not None:
        return tgi
    document = await upstream.ask("/v1/models")
    cards = document.get("data") if isinstance(document, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards):
        raise ModelError("/v1/models is not a list of models: no server with an OpenAI-compatible API")
    card = _choose(cards, settings)
    dialect = BY_OWNER.get(str(card.get("owned_by")), PlainDialect())
    context_tokens = _count(card.get("max_model_len"))
    if isinstance(dialect, LlamaCppDialect):
        context_tokens = await _llama_cpp_context(upstream, card)
    return Server(dialect, card["id"], context_tokens)


def _choose(cards: list[dict[str, Any]], settings: EngineSettings) -> dict[str, Any]:
    """The model that clients of this system mean; a server of one model serves that, whatever it calls it."""
    wanted = [name for name in (settings.served_name, settings.model, settings.model_name) if name]
    for name in wanted:
        for card in cards:
            if name in (card["id"], card.get("root")):
                return card
    if len(cards) == 1:
        return cards[0]
    served = ", ".join(card["id"] for card in cards) or "none"
    raise ModelError(f"it serves several models ({served}) and none is called {wanted[0]!r}; set engine.served_name")


async def _tgi(upstream: Upstream) -> Server | None:
    """TGI tells of itself at `/info`; its `/v1/models` names the model as its owner."""
    try:
        info = await upstream.ask("/info")
    except (ModelError, WireError):  # no such path; whether the server is there is for the next question to find out
        return None
    if not isinstance(info, dict) or not isinstance(info.get("model_id"), str) or "max_total_tokens" not in info:
        return None
    return Server(TgiDialect(), info["model_id"], _count(info["max_total_tokens"]))


async def _llama_cpp_context(upstream: Upstream, card: dict[str, Any]) -> int | None:
    """Tokens of one slot: the context is divided among those that run at once."""
    try:
        properties = await upstream.ask("/props")
    except (ModelError, WireError):
        properties = {}
    defaults = properties.get("default_generation_settings") if isinstance(properties, dict) else None
    meta = card.get("meta")
    slot = defaults.get("n_ctx") if isinstance(defaults, dict) else None
    return _count(slot) or (_count(meta.get("n_ctx_train")) if isinstance(meta, dict) else None)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
