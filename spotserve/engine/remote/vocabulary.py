"""The served model's tokenizer and context, read from local files: for servers that take or give text in place of token ids.

Text that comes in pieces is turned into ids word by word: what is given out is final and says exactly the text that came, but
a server that gives no ids may have computed other ids that say the same.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

from spotserve.core.errors import ModelError

REPLACEMENT = "\ufffd"
"""What half a character decodes to."""

_FILES = ("tokenizer.json", "config.json")
_HISTORY_TOKENS = (32, 8, 1)
"""How many tokens before a text are encoded with it, so that it is cut as in its context; fewer when they do not survive."""
_HELD_TOKENS = 8
"""Without a border between words, so many tokens at the end may still turn out otherwise."""


class Vocabulary:
    """Token ids and text of one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        config = config.get("text_config") or config
        self._tokenizer = tokenizer
        self._framing = self.encode("", framed=True)
        self._special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.size: int = config.get("vocab_size") or tokenizer.get_vocab_size(with_added_tokens=True)
        self.context_tokens: int | None = config.get("max_position_embeddings")
        """What the model's configuration allows; None: it does not say."""

    def encode(self, text: str, *, framed: bool = False) -> tuple[int, ...]:
        """Ids of a text; `framed`: with the special tokens that the tokenizer puts around a prompt."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=framed).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a sequence, special tokens by their names."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def prompt_text(self, token_ids: Sequence[int]) -> str:
        """What to send to a server that tokenises and frames prompts by itself, so that it ends up with these ids if it can."""
        begins = len(self._framing)
        if begins and tuple(token_ids[:begins]) == self._framing:
            text = self.decode(token_ids[begins:])
            if self.encode(text, framed=True) == tuple(token_ids):
                return text
        return self.decode(token_ids)

    def continue_from(self, history: Sequence[int], text: str) -> tuple[int, ...]:
        """Ids of `text` as it goes on after the ids of `history`."""
        begins = max((place + 1 for place, token_id in enumerate(history) if token_id in self._special_ids), default=0)
        for length in _HISTORY_TOKENS:
            context = tuple(history[begins:][-length:])
            if not context:
                break
            before = self.decode(context)
            token_ids = self.encode(before + text)
            if REPLACEMENT not in before and token_ids[: len(context)] == context:
                return token_ids[len(context) :]
        return self.encode(text)


class RunningTokens:
    """Turns the text of one answer into ids as it comes: pushes and flush together say all of it."""

    def __init__(self, vocabulary: Vocabulary, history: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._history = list(history[-max(_HISTORY_TOKENS) :])
        self._held = ""

    def push(self, text: str) -> tuple[int, ...]:
        """Ids that became final: those of all words but the last one, which may go on."""
        self._held += text
        border = _last_border(self._held)
        if border > 0:
            final, self._held = self._held[:border], self._held[border:]
            return self._give(self._vocabulary.continue_from(self._history, final))
        token_ids = self._vocabulary.continue_from(self._history, self._held)
        final_ids = token_ids[: len(token_ids) - _HELD_TOKENS]
        said = self._vocabulary.decode(final_ids)
        if len(token_ids) <= 2 * _HELD_TOKENS or not self._held.startswith(said) or REPLACEMENT in said:
            return ()
        self._held = self._held[len(said) :]
        return self._give(final_ids)

    def flush(self) -> tuple[int, ...]:
        """Ids of what was held back: no more text comes, or ids come next."""
        held, self._held = self._held, ""
        return self._give(self._vocabulary.continue_from(self._history, held)) if held else ()

    def note(self, token_ids: Sequence[int]) -> None:
        """These ids came as they are, after all text so far was flushed."""
        self._give(tuple(token_ids))

    def _give(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        self._history = [*self._history, *token_ids][-max(_HISTORY_TOKENS) :]
        return token_ids


def _last_border(text: str) -> int:
    """Where the last word begins, with the single space before it, which vocabularies count to the word; 0: nowhere."""
    place = text.rfind(" ")
    while place > 0 and (place + 1 == len(text) or text[place + 1].isspace() or text[place - 1].isspace()):
        place = text.rfind(" ", 0, place)
    return max(0, place)


def load_vocabulary(model: str) -> Vocabulary:
    """The vocabulary of a model: a local folder in Hugging Face format, or a hub id whose files are fetched.

    Raises:
        ModelError: there are no such files, or they make no sense.
    """
    folder = Path(model) if Path(model).is_dir() else _fetch(model)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8")) if (folder / "config.json").is_file() else {}
        return Vocabulary(Tokenizer.from_file(os.fspath(folder / "tokenizer.json")), config)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(f"the tokenizer of {model} cannot be read: {error}") from error


def _fetch(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # the hub's errors are all one of these
        raise ModelError(f"{model} is neither a folder nor a model of the hub within reach: {error}") from error
