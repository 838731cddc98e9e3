"""The JSON of answers: whole bodies, and the events of a stream, for both kinds of call.

A stream's event is cut from a template made once per choice; per token only the new text is encoded. Every event carries an
`id:` that says where each choice stands after it, so the last one read is all that a client needs to come back:
the choices' positions in order, joined by dots, and one further part `1` once the usage has been sent. Does not know sockets.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from spotserve.core.errors import InvalidRequest
from spotserve.gateway.answer import Answer, Choice, Finish, Piece, ScoredToken
from spotserve.gateway.problems import Problem
from spotserve.gateway.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""

encode_json = msgspec.json.Encoder().encode


class Cursor(msgspec.Struct, frozen=True):
    """Where a client stands in a stream."""

    positions: tuple[int, ...]
    """Of each choice, its end counted as one."""
    usage_sent: bool = False


def read_cursor(text: str, *, choices: int) -> Cursor:
    """The cursor that an event's id stands for.

    Raises:
        InvalidRequest: no event of this call had that id.
    """
    parts = text.strip().split(".")
    if len(parts) not in (choices, choices + 1) or not all(p.isascii() and p.isdecimal() and len(p) <= 10 for p in parts):
        raise InvalidRequest("'Last-Event-ID' is not the id of an event of this stream.", param="last_event_id")
    return Cursor(tuple(int(part) for part in parts[:choices]), usage_sent=len(parts) > choices)


def error_event(problem: Problem) -> bytes:
    """The event that makes a client raise, in place of a silent cut."""
    return b"data: " + problem.to_json() + b"\n\n"


class EventWriter:
    """Writes the events of one stream."""

    def __init__(self, answer: Answer, tokenizer: Tokenizer) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._is_chat = answer.envelope.kind == "chat"
        self._extended = answer.envelope.return_token_ids or answer.envelope.return_gaps
        self._scored = answer.envelope.top_logprobs is not None
        self._head = _object_head(answer, "chat.completion.chunk" if self._is_chat else "text_completion")
        usage = b',"usage":null' if answer.envelope.include_usage else b""
        self._tail = b"]" + usage + b"}\n\n"
        field = b',"delta":{"content":' if self._is_chat else b',"text":'
        self._choice_heads = [
            b"data: " + self._head + b'"choices":[{"index":' + str(choice.index).encode() + field for choice in answer.choices
        ]
        close = b"}" if self._is_chat else b""
        self._text_tail = close + b',"logprobs":null,"finish_reason":null}' + self._tail

    def opening(self) -> bytes:
        """What comes before all tokens: the roles, or the echoed prompts. Only the last event has an id."""
        if not self._is_chat and not self._answer.envelope.echo:
            return b""
        events = [b"data: " + self._event_json(self._opening_choice(choice)) for choice in self._answer.choices]
        events[-1] = self._id_line() + events[-1]
        return b"".join(events)

    def progress(self, choice: Choice) -> bytes:
        """The event of what the choice has to say now; nothing if that is nothing."""
        piece = choice.piece
        if not piece.text and not (self._extended and piece.token_ids + piece.gaps):
            return b""
        choice.said_position = choice.tokens
        if self._scored or self._extended:
            choice.piece = Piece()
            return self._id_line() + b"data: " + self._event_json(self._choice_json(choice, piece, piece.text, None))
        text, piece.text = piece.text, ""
        return self._id_line() + self._choice_heads[choice.index] + encode_json(text) + self._text_tail

    def end(self, choice: Choice) -> bytes:
        """The event of the choice's end, with the text that the end set free."""
        text = choice.last_text()
        piece, choice.piece = choice.piece, Piece()
        choice.said_position = choice.tokens + 1
        return self._id_line() + b"data: " + self._event_json(self._choice_json(choice, piece, text, choice.finish))

    def usage(self) -> bytes:
        """The event that counts tokens."""
        usage = encode_json(self._answer.usage)
        return self._id_line(b".1") + b"data: " + self._head + b'"choices":[],"usage":' + usage + b"}\n\n"

    def _id_line(self, suffix: bytes = b"") -> bytes:
        choices = self._answer.choices
        if len(choices) == 1:
            return b"id: %d%b\n" % (choices[0].said_position, suffix)
        return b"id: " + ".".join([str(choice.said_position) for choice in choices]).encode() + suffix + b"\n"

    def _event_json(self, choice: dict[str, Any]) -> bytes:
        return self._head + b'"choices":[' + encode_json(choice) + self._tail

    def _opening_choice(self, choice: Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if self._is_chat else {"text": choice.echo}
        return {"index": choice.index, **said, "logprobs": None, "finish_reason": None}

    def _choice_json(self, choice: Choice, piece: Piece, text: str, finish: Finish | None) -> dict[str, Any]:
        if self._is_chat:
            said: dict[str, Any] = {"delta": {} if finish is not None and not text else {"content": text}}
        else:
            said = {"text": text}
        return {"index": choice.index, **said, **_extras(self._answer, self._tokenizer, piece), **_finish_fields(finish)}


def whole_body(answer: Answer, tokenizer: Tokenizer) -> bytes:
    """The body of a call that is not streamed, once every choice has ended."""
    is_chat = answer.envelope.kind == "chat"
    choices = []
    for choice in answer.choices:
        text = choice.piece.text + choice.last_text()
        said: dict[str, Any] = {"text": choice.echo + text}
        if is_chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        elif answer.envelope.return_token_ids:
            said["prompt_token_ids"] = answer.prompts[choice.index // answer.envelope.choices_per_prompt]
        extras = _extras(answer, tokenizer, choice.piece)
        choices.append({"index": choice.index, **said, **extras, **_finish_fields(choice.finish)})
    rest: dict[str, Any] = {"choices": choices, "usage": answer.usage}
    if is_chat and answer.envelope.return_token_ids:
        rest["prompt_token_ids"] = answer.prompts[0]
    return _object_head(answer, "chat.completion" if is_chat else "text_completion") + encode_json(rest)[1:]


def _object_head(answer: Answer, kind: str) -> bytes:
    """The fields that every object of an answer begins with, up to and with a comma."""
    envelope = answer.envelope
    head = {
        "id": answer.call_id,
        "object": kind,
        "created": envelope.created_s,
        "model": envelope.model,
        "system_fingerprint": None,
    }
    return encode_json(head)[:-1] + b","


def _finish_fields(finish: Finish | None) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None}
    return {"finish_reason": finish.reason, "stop_reason": finish.stop_reason}


def _extras(answer: Answer, tokenizer: Tokenizer, piece: Piece) -> dict[str, Any]:
    fields: dict[str, Any] = {"logprobs": None}
    if answer.envelope.top_logprobs is not None and piece.scores:
        write = _chat_logprobs if answer.envelope.kind == "chat" else _completion_logprobs
        fields["logprobs"] = write(piece.scores, tokenizer)
    if answer.envelope.return_token_ids:
        fields["token_ids"] = piece.token_ids
    if answer.envelope.return_gaps:
        fields["gaps"] = piece.gaps
    return fields


def _chat_logprobs(scores: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = tokenizer.token_bytes(token_id)
        return {"token": token.decode(errors="replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(token)}

    content = [
        {
            **entry(score.token_id, score.logprob.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in score.logprob.top],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(scores: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    def name(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode(errors="replace")

    return {
        "tokens": [name(score.token_id) for score in scores],
        "token_logprobs": [max(score.logprob.logprob, LEAST_LOGPROB) for score in scores],
        "top_logprobs": [{name(i): max(value, LEAST_LOGPROB) for i, value in score.logprob.top} for score in scores],
        "text_offset": [score.text_offset for score in scores],
    }
