"""What a kind of server has to be able to say, and whether it can say what a request asks. Pure: values in, values out.

Servers differ in whether prompts may be token ids, whether their streams hold ids, and which sampling parameters there are. What a
server cannot express as `core.request` means it is an `InvalidRequest` that names the parameter. Every parameter is sent with
its value, because servers have defaults of their own (a model's `generation_config.json`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from spotserve.core.errors import InvalidRequest
from spotserve.core.request import FinishReason, SamplingParams, TokenLogprob

Body = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a server is to continue, and how."""

    model: str
    """The server's name for it."""
    token_ids: tuple[int, ...]
    """Prompt and what was emitted so far."""
    text: str
    """The same as text; empty where the dialect takes ids."""
    max_tokens: int
    min_tokens: int
    seed: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one event of a stream adds to an answer."""

    text: str = ""
    token_ids: tuple[int, ...] | None = None
    """None: this event has no ids for its text."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


class Dialect(Protocol):
    """One kind of server."""

    name: str
    path: str
    """Where answers are streamed from, below the server's root."""
    health_path: str
    takes_token_ids: bool
    """Whether prompts are ids."""
    omits_split_characters: bool
    """Whether the stream lacks the ids of tokens that end inside a character, and has their text with the next token's."""
    parameters: frozenset[str]
    """Of `_ASKED`, what it can express."""

    def body(self, ask: Ask) -> Body:
        """The request that asks for a stream."""

    def read(self, data: bytes) -> Piece:
        """One event.

        Raises:
            InvalidRequest, Overloaded, ModelError: the event says so.
            WireError: it is not what this dialect says.
        """


_ASKED: Mapping[str, Callable[[SamplingParams], bool]] = {
    "top_k": lambda sampling: sampling.temperature > 0 and sampling.top_k > 0,
    "min_p": lambda sampling: sampling.temperature > 0 and sampling.min_p > 0,
    "presence_penalty": lambda sampling: sampling.presence_penalty != 0,
    "frequency_penalty": lambda sampling: sampling.frequency_penalty != 0,
    "repetition_penalty": lambda sampling: sampling.repetition_penalty != 1,
    "logit_bias": lambda sampling: bool(sampling.logit_bias),
    "min_tokens": lambda sampling: sampling.min_tokens > 0,
    "stop_token_ids": lambda sampling: bool(sampling.stop_token_ids),
    "ignore_eos": lambda sampling: sampling.ignore_eos,
    "logprobs": lambda sampling: sampling.logprobs is not None,
    "return_gaps": lambda sampling: sampling.gaps,
}
"""By the names of the API: whether a request asks for what not every server has. Greedy choice is above every cut."""

EVERYTHING = frozenset(_ASKED) - {"return_gaps"}
"""What the API of this system has, but for what only its own engine can tell."""


def check_expressible(dialect: Dialect, sampling: SamplingParams) -> None:
    """Raises InvalidRequest, naming the parameter, when the server cannot do what the request asks."""
    for name, is_asked in _ASKED.items():
        if name not in dialect.parameters and is_asked(sampling):
            raise InvalidRequest(
                f"'{name}' is not supported: the engine behind this model ({dialect.name}) cannot do it.",
                param=name,
                code="unsupported_parameter",
            )
