"""The bodies of OpenAI's completion calls, as clients send them: types, ranges, and what is not served here.

The border where foreign words stop. Invariant: whatever bytes come in, out comes a body whose every field has the type and range
written here, or an `InvalidRequest` that names the offending field. A parameter that would change the answer and is not served is
refused, never dropped; one that cannot change it is accepted; an unknown one is ignored. Knows no tokens.
"""

import logging
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from spotserve.core.errors import InvalidRequest

MAX_CHOICES = 64
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024

_log = logging.getLogger(__name__)

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Logprobs = Annotated[int, Meta(ge=0, le=20)]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream tells besides its choices."""

    include_usage: bool | None = None


class CallBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of call have in common. None means: not given."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    n: Choices | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    """Beyond this range logits overflow."""
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    min_tokens: Natural | None = None
    stop_token_ids: list[Natural] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_gaps: bool | None = None
    """By how much each chosen token led the runner-up: what tells a near tie."""
    return_speculation: bool | None = None
    """What became of draft tokens, in the usage."""


class CompletionBody(CallBody, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None
    """A text, several texts, one prompt's token ids, or several prompts' token ids."""
    echo: bool | None = None
    logprobs: Logprobs | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatBody(CallBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message] | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_UNSERVED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Parameters that change the answer and are not served, with the values (besides null) that ask for nothing."""

Body = TypeVar("Body", bound=CallBody)


def read_chat(body: bytes) -> ChatBody:
    """A chat call from its JSON.

    Raises:
        InvalidRequest: it is not JSON, or a field has the wrong type or range, or asks for what is not served.
    """
    fields = _read_object(body)
    if fields.get("echo"):
        raise _unserved("echo")
    chat = _convert(fields, ChatBody)
    if not chat.messages:
        raise InvalidRequest("'messages' must hold at least one message.", param="messages")
    for index, message in enumerate(chat.messages):
        _check_message(message, f"messages[{index}]")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return chat


def read_completion(body: bytes) -> CompletionBody:
    """A completion call from its JSON.

    Raises:
        InvalidRequest: as `read_chat`.
    """
    fields = _read_object(body)
    completion = _convert(fields, CompletionBody)
    if completion.prompt is None:
        raise InvalidRequest("You must provide a 'prompt' parameter.", param="prompt")
    if completion.echo and completion.logprobs is not None:
        raise InvalidRequest("'logprobs' together with 'echo' is not supported.", param="logprobs", code="unsupported_parameter")
    return completion


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body is not a JSON object: {error}.") from error
    except ValueError as error:  # malformed JSON, broken UTF-8, a number of thousands of digits
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("We could not parse the JSON body of your request: it is nested too deeply.") from error


def _convert(fields: dict[str, Any], kind: type[Body]) -> Body:
    for name, idle in _UNSERVED.items():
        value = fields.get(name)
        if value is not None and value not in idle:
            raise _unserved(name)
    try:
        body = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _field_error(error) from error
    if fields.get("best_of") not in (None, body.n or 1):
        raise InvalidRequest("'best_of' other than 'n' is not supported.", param="best_of", code="unsupported_parameter")
    if _log.isEnabledFor(logging.DEBUG):
        ignored = sorted(fields.keys() - {*kind.__struct_fields__, *_UNSERVED})
        _log.debug("ignored parameters: %s", ", ".join(name[:64] for name in ignored[:16]) or "none")
    return body


def _check_message(message: Message, path: str) -> None:
    if message.role not in ("system", "developer", "user", "assistant", "tool", "function"):
        raise InvalidRequest(f"'{path}.role': '{message.role[:64]}' is not a role.", param=f"{path}.role")
    if message.tool_calls:
        raise _unserved(f"{path}.tool_calls")
    if message.function_call is not None:
        raise _unserved(f"{path}.function_call")
    if message.content is None and message.role != "assistant":
        raise InvalidRequest(f"'{path}.content' is missing.", param=f"{path}.content")
    for index, part in enumerate(message.content if isinstance(message.content, list) else ()):
        if part.type != "text":
            raise InvalidRequest(
                f"'{path}.content[{index}]': content of type '{part.type[:64]}' is not supported; only text is.",
                param=f"{path}.content[{index}].type",
                code="unsupported_parameter",
            )
        if part.text is None:
            raise InvalidRequest(f"'{path}.content[{index}].text' is missing.", param=f"{path}.content[{index}].text")


def _unserved(name: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' is not supported by this server.", param=name, code="unsupported_parameter")


def _field_error(error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec says "Expected `int`, got `str` - at `$.max_tokens`"; OpenAI's clients want the field apart."""
    what, _, where = str(error).partition(" - at `$")
    param = where.rstrip("`").removeprefix(".").replace("[...]", "")  # [...]: under some key of an object
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        param = f"{param}.{missing[1]}" if param else missing[1]
    return InvalidRequest(f"Invalid value for '{param or 'body'}': {what[0].lower()}{what[1:]}.", param=param or None)
