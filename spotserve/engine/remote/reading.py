"""Words of servers turned into ours: ends of answers, errors, events. Pure."""

from typing import Any, TypeVar

import msgspec

from spotserve.core.errors import InvalidRequest, ModelError, Overloaded, SpotServeError, WireError
from spotserve.core.request import FinishReason

Document = TypeVar("Document")

_FINISH_REASONS = {
    **dict.fromkeys(("stop", "eos", "word", "eos_token", "stop_sequence"), FinishReason.STOP),
    **dict.fromkeys(("length", "limit"), FinishReason.LENGTH),
}


def finish_reason(word: str | None) -> FinishReason | None:
    """Ours for a server's.

    Raises:
        WireError: it ended for a reason that is no end of an answer (an abort, an error).
    """
    if word is None:
        return None
    if word not in _FINISH_REASONS:
        raise WireError(f"the answer ended with {word!r}")
    return _FINISH_REASONS[word]


def error_of(said: Any, status: int = 500) -> SpotServeError:
    """The error that an error's JSON stands for: `{"message", "code"}`, or a text with the HTTP status beside it."""
    if isinstance(said, dict):
        message, code = str(said.get("message", said)), said.get("code")
        status = code if isinstance(code, int) else status
    else:
        message = str(said)
    if status in (429, 503):
        return Overloaded(message, retry_after_s=0.0)
    if status in (401, 403):
        return ModelError(f"it refuses the key ({status}: {message}); set SPOTSERVE_ENGINE__API_KEY")
    if status in (404, 405):
        return ModelError(f"it does not serve this ({status}: {message})")
    if 400 <= status < 500:
        return InvalidRequest(message, code="refused_by_engine")
    return WireError(f"{status}: {message}")


def decode(data: bytes, kind: type[Document]) -> Document:
    """An event's JSON.

    Raises:
        WireError: it is no such document.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise WireError(f"an event is not what was expected: {error}: {data[:80]!r}") from error
