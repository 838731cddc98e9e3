"""A client's call becomes a `Call` of token ids: prompts encoded, limits checked against the model, seeds dealt.

Invariant: the `Call` alone determines the answer; nothing of the body is needed afterwards. Every choice has its own seed, and
choice 0 has the caller's. Does not know HTTP, streams or text that comes back.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from spotserve.core.errors import ContextTooLong, InvalidRequest, UnknownModel
from spotserve.core.model import ModelSpec
from spotserve.core.request import Request, SamplingParams
from spotserve.gateway.calls import Call, Envelope, pack_envelope
from spotserve.gateway.openai import MAX_STOP_CHARACTERS, MAX_STOPS, CallBody, ChatBody, CompletionBody, Message
from spotserve.gateway.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
GREEDY_TEMPERATURE = 1e-5
"""Lower temperatures are 0: dividing by them would overflow, and the noise could not win anyway."""
MAX_CALL_CHOICES = 256
"""Choices of all prompts of one call together."""


class _Prompt(NamedTuple):
    token_ids: tuple[int, ...]
    text: str | None
    """As the caller wrote it; None: it came as ids."""


class Intake:
    """Turns bodies into calls for one model. Encoding long prompts takes time: call it off the event loop."""

    def __init__(self, tokenizer: Tokenizer, model_name: str) -> None:
        self._tokenizer = tokenizer
        self._model_name = model_name

    def chat(self, body: ChatBody, model: ModelSpec, *, now_s: float) -> Call:
        """The call of a conversation.

        Raises:
            InvalidRequest: the request does not suit the model; UnknownModel, ContextTooLong are among it.
        """
        self._check_model(body.model)
        messages = [_plain_message(message) for message in body.messages or ()]
        text = self._tokenizer.render_chat(messages, body.chat_template_kwargs or {})
        prompt = self._encode(text, model, param="messages", add_special_tokens=bool(body.add_special_tokens))
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_completion_tokens or body.max_tokens
        return self._call("chat", body, [prompt], model, max_tokens=max_tokens, top_logprobs=top_logprobs, echo=(), now_s=now_s)

    def completion(self, body: CompletionBody, model: ModelSpec, *, now_s: float) -> Call:
        """The call of one or several prompts.

        Raises:
            InvalidRequest: as `chat`.
        """
        self._check_model(body.model)
        prompts = self._read_prompts(body, model)
        echo = tuple(self._tokenizer.decode(p.token_ids) if p.text is None else p.text for p in prompts) if body.echo else ()
        room_tokens = model.context_tokens - max(len(prompt.token_ids) for prompt in prompts)
        max_tokens = body.max_tokens or min(DEFAULT_COMPLETION_TOKENS, max(1, room_tokens))
        return self._call(
            "completion", body, prompts, model, max_tokens=max_tokens, top_logprobs=body.logprobs, echo=echo, now_s=now_s
        )

    def _check_model(self, name: str | None) -> None:
        if name and name != self._model_name:
            raise UnknownModel(f"The model '{name[:256]}' does not exist.", param="model", code="model_not_found")

    def _call(
        self,
        kind: Literal["chat", "completion"],
        body: CallBody,
        prompts: Sequence[_Prompt],
        model: ModelSpec,
        *,
        max_tokens: int | None,
        top_logprobs: int | None,
        echo: tuple[str, ...],
        now_s: float,
    ) -> Call:
        choices = body.n or 1
        if len(prompts) * choices > MAX_CALL_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n = {choices} are more than {MAX_CALL_CHOICES} choices.",
                param="prompt" if len(prompts) > MAX_CALL_CHOICES else "n",
            )
        seed = secrets.randbits(63) if body.seed is None else _fold_seed(body.seed)
        call_id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(16)}"
        requests: list[Request] = []
        for prompt in prompts:
            limit = _output_limit(len(prompt.token_ids), max_tokens, model, param="messages" if kind == "chat" else "prompt")
            sampling = _sampling(body, model, max_tokens=limit, logprobs=top_logprobs)
            for _ in range(choices):
                index = len(requests)
                requests.append(
                    Request(
                        request_id=f"{call_id}-{index}",
                        prompt_token_ids=prompt.token_ids,
                        sampling=msgspec.structs.replace(sampling, seed=choice_seed(seed, index)),
                        arrival_s=now_s,
                        priority=body.priority or 0,
                    )
                )
        envelope = Envelope(
            kind=kind,
            model=self._model_name,
            created_s=int(now_s),
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
            choices_per_prompt=choices,
            stop=_stops(body.stop),
            include_stop_text=bool(body.include_stop_str_in_output),
            show_special_tokens=body.skip_special_tokens is False,
            echo=echo,
            top_logprobs=top_logprobs,
            return_token_ids=bool(body.return_token_ids),
            return_gaps=bool(body.return_gaps),
            return_speculation=bool(body.return_speculation),
        )
        return Call(call_id, pack_envelope(envelope), tuple(requests))

    def _read_prompts(self, body: CompletionBody, model: ModelSpec) -> list[_Prompt]:
        prompt, add_special_tokens = body.prompt, body.add_special_tokens is not False
        if isinstance(prompt, str):
            return [self._encode(prompt, model, param="prompt", add_special_tokens=add_special_tokens)]
        items = prompt or []
        if not items:
            raise InvalidRequest("'prompt' is empty.", param="prompt")
        if all(isinstance(item, int) for item in items):
            return [_token_prompt(items, model, "prompt")]
        if len(items) > MAX_CALL_CHOICES:
            raise InvalidRequest(f"'prompt' holds more than {MAX_CALL_CHOICES} prompts.", param="prompt")
        prompts = []
        for index, item in enumerate(items):
            if isinstance(item, str) and isinstance(items[0], str):
                prompts.append(self._encode(item, model, param=f"prompt[{index}]", add_special_tokens=add_special_tokens))
            elif isinstance(item, list) and isinstance(items[0], list):
                prompts.append(_token_prompt(item, model, f"prompt[{index}]"))
            else:
                raise InvalidRequest("'prompt' mixes texts and token ids.", param="prompt")
        return prompts

    def _encode(self, text: str, model: ModelSpec, *, param: str, add_special_tokens: bool) -> _Prompt:
        if not text:
            raise InvalidRequest(f"'{param}' is empty.", param=param)
        if len(text) > model.context_tokens * self._tokenizer.longest_token_characters:
            raise _too_long(model, f"'{param}' has {len(text)} characters, which cannot fit", param=param)
        token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidRequest(f"'{param}' holds no tokens.", param=param)
        _check_ids(token_ids, model, param)
        return _Prompt(token_ids, text)


def choice_seed(seed: int, index: int) -> int:
    """Seed of a call's choice: the call's own for choice 0, unrelated ones for the others, the same on every call."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _fold_seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest("Invalid value for 'seed': expected a 64-bit integer.", param="seed")
    return seed % 2**64


def _token_prompt(token_ids: Sequence[object], model: ModelSpec, param: str) -> _Prompt:
    if not token_ids:
        raise InvalidRequest(f"'{param}' is empty.", param=param)
    if len(token_ids) >= model.context_tokens:
        raise _too_long(model, f"'{param}' has {len(token_ids)} tokens", param=param)
    ids = tuple(token_id for token_id in token_ids if isinstance(token_id, int))
    _check_ids(ids, model, param)
    return _Prompt(ids, None)


def _check_ids(token_ids: Sequence[int], model: ModelSpec, param: str) -> None:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < model.vocabulary_size:
            what = f"token id {token_id}" if -(2**63) <= token_id < 2**63 else "a token id"
            raise InvalidRequest(
                f"Invalid value for '{param}': {what} is outside the vocabulary of {model.vocabulary_size}.", param=param
            )


def _output_limit(prompt_tokens: int, max_tokens: int | None, model: ModelSpec, *, param: str) -> int:
    """Most tokens this prompt may get; not given: all that remains of the context."""
    room_tokens = model.context_tokens - prompt_tokens
    if room_tokens < 1:
        raise _too_long(model, f"the prompt has {prompt_tokens} tokens", param=param)
    if max_tokens is not None and max_tokens > room_tokens:
        raise _too_long(model, f"you asked for {prompt_tokens} in the prompt and {max_tokens} in the output", param=param)
    return room_tokens if max_tokens is None else max_tokens


def _too_long(model: ModelSpec, reason: str, *, param: str) -> ContextTooLong:
    return ContextTooLong(
        f"This model's maximum context length is {model.context_tokens} tokens; {reason}.",
        param=param,
        code="context_length_exceeded",
    )


def _sampling(body: CallBody, model: ModelSpec, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"'min_tokens' ({min_tokens}) is more than the {max_tokens} allowed.", param="min_tokens")
    temperature = _given(body.temperature, 1.0)
    stop_token_ids = tuple(body.stop_token_ids or ())
    if stop_token_ids:
        _check_ids(stop_token_ids, model, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < GREEDY_TEMPERATURE else temperature,
        top_p=_given(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),  # vLLM's -1 means off
        min_p=_given(body.min_p, 0.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, model),
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        gaps=bool(body.return_gaps),
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(biases: dict[str, float], model: ModelSpec) -> dict[int, float]:
    by_id = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < model.vocabulary_size):
            raise InvalidRequest(
                f"Invalid key in 'logit_bias': '{key[:32]}' is not a token id below {model.vocabulary_size}.", param="logit_bias"
            )
        by_id[int(key)] = bias
    return by_id


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"'stop' holds {len(stops)} strings; at most {MAX_STOPS} are allowed.", param="stop")
    if not all(1 <= len(text) <= MAX_STOP_CHARACTERS for text in stops):
        raise InvalidRequest(f"'stop' strings must have 1 to {MAX_STOP_CHARACTERS} characters.", param="stop")
    return tuple(dict.fromkeys(stops))


def _plain_message(message: Message) -> dict[str, str]:
    """The message as chat templates know it: content in one piece, and the older name of the developer's role."""
    parts = message.content
    content = parts if isinstance(parts, str) else "\n".join(part.text or "" for part in parts or ())
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain
