"""A model's tokenizer and chat template, read from its files: text to ids, ids to text, messages to a prompt.

Stands on the `tokenizers` library alone: no tensors come with it. Invariant: `detokenizer` over a sequence of ids says what
`decode` says of the whole. Does not know calls, HTTP or models' weights.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders

from spotserve.core.errors import InvalidRequest, ModelError
from spotserve.gateway.template import ChatTemplate
from spotserve.gateway.text import ByteDetokenizer, Detokenizer, WindowDetokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json")


class Tokenizer:
    """Text and token ids of one model. Safe to use from several threads."""

    def __init__(self, fast: FastTokenizer, special_tokens: Mapping[str, str], template: ChatTemplate | None) -> None:
        self._fast = fast
        self._special_tokens = dict(special_tokens)
        self._template = template
        vocabulary: dict[str, int] = fast.get_vocab(with_added_tokens=True)
        added = fast.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocabulary_size = max(vocabulary.values(), default=-1) + 1
        self.longest_token_characters = max((len(token) for token in vocabulary), default=1)
        """No token stands for more characters than this; text longer than its multiple cannot fit a context."""
        self._token_bytes = _byte_table(vocabulary) if isinstance(fast.decoder, decoders.ByteLevel) else None
        self._said_bytes = {i: b for i, b in (self._token_bytes or {}).items() if i not in self._special_ids}

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Ids of a text; with `add_special_tokens` as the model's post-processor frames a prompt."""
        return tuple(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, show_special_tokens: bool = False) -> str:
        """Text of a whole sequence."""
        return str(self._fast.decode(list(token_ids), skip_special_tokens=not show_special_tokens))

    def detokenizer(self, *, show_special_tokens: bool = False) -> Detokenizer:
        """A fresh incremental decoder: its pushes and flush add up to `decode`."""
        if self._token_bytes is not None:
            return ByteDetokenizer(self._token_bytes if show_special_tokens else self._said_bytes)
        return WindowDetokenizer(
            lambda token_ids: self.decode(token_ids, show_special_tokens=show_special_tokens),
            frozenset() if show_special_tokens else self._special_ids,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special tokens by their name; incomplete characters are left as they are."""
        if self._token_bytes is not None:
            return self._token_bytes.get(token_id, b"")
        return self.decode((token_id,), show_special_tokens=True).encode()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> str:
        """The prompt of a conversation; `extra` are variables of the template that the caller sets.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template")
        return self._template.render(messages, {**self._special_tokens, **extra})


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model: a local folder in Hugging Face format, or a hub id whose tokenizer files are fetched.

    Raises:
        ModelError: there are no such files, or they make no sense.
    """
    if model.startswith("s3://"):
        raise ModelError(f"{model}: tokenizers are not read from there; name a local folder or a hub id in engine.tokenizer")
    folder = Path(model) if Path(model).is_dir() else _fetch(model)
    try:
        settings = _read_json(folder / "tokenizer_config.json")
        return Tokenizer(
            FastTokenizer.from_file(os.fspath(folder / "tokenizer.json")),
            _special_tokens(settings, _read_json(folder / "special_tokens_map.json")),
            _find_template(folder, settings),
        )
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(f"the tokenizer of {model} cannot be read: {error}") from error


def _fetch(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError) as error:  # the hub's errors are all one of these
        raise ModelError(f"{model} is neither a folder nor a model of the hub within reach: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like by name; a token is written as text or as an object with `content`."""
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
        for source in sources:
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens


def _find_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text("utf-8"))
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return ChatTemplate(template) if isinstance(template, str) else None


def _byte_table(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Bytes of each token of a byte-level vocabulary, as the ByteLevel decoder reads them.

    Such a vocabulary writes every byte as one printable character (GPT-2's table); a token with any other character is an
    added one and stands for itself.
    """
    byte_of = _printable_bytes()
    table = {}
    for token, token_id in vocabulary.items():
        values = [byte_of.get(character) for character in token]
        table[token_id] = token.encode() if None in values else bytes(value for value in values if value is not None)
    return table


def _printable_bytes() -> dict[str, int]:
    """Character to byte: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
