"""Which files of a model hold its tensors: one file, or shards and an index."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import msgspec

from spotserve.core.errors import ModelError

INDEX_SUFFIX = ".safetensors.index.json"
_STEMS = ("model", "pytorch_model")  # the second is what converters of older files wrote
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt)")
_MAX_TEXT_BYTES = 64 * 2**20
CONFIG_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Configuration, tokenizer, chat template, index."""


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]
    metadata: Any = None


def find_weights(files: Collection[str], where: str) -> str:
    """The file to begin with, among the names in a model's folder: its only weight file, or the index of its shards.

    Raises:
        ModelError: there is none; a model of pickled files is refused, for reading them runs code.
    """
    for stem in _STEMS:
        for name in (f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}"):
            if name in files:
                return name
    others = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if len(others) == 1:
        return others[0]
    expected = "expected model.safetensors or model.safetensors.index.json"
    if others:
        raise ModelError(f"{where}: {expected}; cannot choose among {', '.join(others[:4])}")
    if pickled := sorted(name for name in files if _PICKLED.fullmatch(name)):
        raise ModelError(
            f"{where}: {pickled[0]} is a pickle, which runs code when it is read: convert to safetensors "
            f"(save_pretrained of transformers writes it); {expected}"
        )
    raise ModelError(f"{where}: no weights: {expected}")


def parse_index(content: bytes, where: str) -> Mapping[str, str]:
    """From tensor name to file name, as the index says.

    Raises:
        ModelError: it is damaged, or names a file outside the model's folder.
    """
    try:
        index = msgspec.json.decode(content, type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{where}: damaged: {error}; expected an object with weight_map, from tensor to file") from error
    for file in set(index.weight_map.values()):
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ModelError(f"{where}: names {file!r}; expected a safetensors file in the same folder")
    return index.weight_map


def is_config_file(name: str, size_bytes: int) -> bool:
    """Whether a file of a model's folder is configuration, tokenizer or chat template."""
    path = PurePosixPath(name)
    return len(path.parts) == 1 and size_bytes <= _MAX_TEXT_BYTES and any(path.match(each) for each in CONFIG_PATTERNS)


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """Where to look for a tensor."""

    where: str
    """The index itself, or the folder without one; for messages."""
    files: tuple[str, ...]
    """Every weight file."""
    file_of: Mapping[str, str] | None
    """From tensor to file; None: there is one file, whose header tells."""

    def needed(self, wanted_names: Collection[str] | None) -> list[str]:
        """Files that hold the wanted tensors (None: all), sorted.

        Raises:
            ModelError: a wanted tensor is in none.
        """
        if wanted_names is None or self.file_of is None:
            return list(self.files)
        if unknown := sorted(name for name in wanted_names if name not in self.file_of):
            raise ModelError(f"{self.where}: no tensor {unknown[0]}" + (f" and {len(unknown) - 1} others" * (len(unknown) > 1)))
        return sorted({self.file_of[name] for name in wanted_names})

    def check_present(self, present: Collection[str], wanted_names: Collection[str] | None) -> None:
        """Refuses an index that names files which are not there.

        Raises:
            ModelError: a file that holds wanted tensors is absent.
        """
        for file in self.needed(wanted_names):
            if file not in present:
                raise ModelError(f"{self.where}: names {file}, which is not there; is the copy complete?")


def read_index(files: Collection[str], read: Callable[[str], bytes], where: str) -> WeightIndex:
    """The index of a model whose folder holds `files`; `read` gives the content of a small one.

    Raises:
        ModelError: there are no weights, or the index is damaged.
    """
    first = find_weights(files, where)
    if not first.endswith(INDEX_SUFFIX):
        return WeightIndex(where, (first,), None)
    file_of = parse_index(read(first), f"{where}/{first}")
    return WeightIndex(f"{where}/{first}", tuple(sorted(set(file_of.values()))), file_of)
