"""A model whose weight files are opened one by one, when something in them is asked for."""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from spotserve.core.errors import ModelError
from spotserve.engine.files.header import TensorPlace
from spotserve.engine.files.model_index import WeightIndex
from spotserve.engine.files.tensor_files import TensorPart


class WeightFile(Protocol):
    """One safetensors file."""

    places: Mapping[str, TensorPlace]

    @property
    def bytes_read(self) -> int:
        """As `TensorFiles.bytes_read`."""
        ...

    def read(self, name: str, dim: int | None, spans: Sequence[range]) -> torch.Tensor:
        """As `TensorFiles.read`."""
        ...

    def prefetch(self, parts: Sequence[TensorPart]) -> None:
        """As `TensorFiles.prefetch`, of tensors in this file."""
        ...

    def close(self) -> None:
        """Lets go of the file."""
        ...


class OpenedModel:
    """`TensorFiles` over `index`; `open_file` opens one of its files, `let_go` is called at the end."""

    def __init__(
        self, config_folder: Path, index: WeightIndex, open_file: Callable[[str], WeightFile], let_go: Callable[[], None]
    ) -> None:
        self.config_folder = config_folder
        self._index = index
        self._open_file = open_file
        self._let_go = let_go
        self._files: dict[str, WeightFile] = {}
        self._lock = threading.Lock()

    def check(self, file_names: Iterable[str]) -> None:
        """Opens these files, so that what is wrong with them is found now.

        Raises:
            ModelError: one of them is damaged, or lacks a tensor that the index says it has.
        """
        opened = {file_name: self._opened(file_name) for file_name in file_names}
        for name, file_name in (self._index.file_of or {}).items():
            if file_name in opened and name not in opened[file_name].places:
                raise ModelError(f"{self._index.where}: says that {name} is in {file_name}, which does not have it")

    @property
    def bytes_read(self) -> int:
        """As `TensorFiles.bytes_read`."""
        return sum(file.bytes_read for file in list(self._files.values()))

    def names(self) -> Collection[str]:
        """As `TensorFiles.names`."""
        return self._opened(self._index.files[0]).places.keys() if self._index.file_of is None else self._index.file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """As `TensorFiles.shape`."""
        return self._holder(name).places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """As `TensorFiles.dtype`."""
        return self._holder(name).places[name].dtype

    def read(self, name: str, dim: int | None = None, spans: Sequence[range] = ()) -> torch.Tensor:
        """As `TensorFiles.read`."""
        return self._holder(name).read(name, dim, spans)

    def prefetch(self, parts: Iterable[TensorPart]) -> None:
        """As `TensorFiles.prefetch`."""
        by_file: dict[str, tuple[WeightFile, list[TensorPart]]] = {}
        for part in parts:
            holder = self._holder(part.name)
            by_file.setdefault(self._file_name(part.name), (holder, []))[1].append(part)
        for file, its_parts in by_file.values():
            file.prefetch(its_parts)

    def close(self) -> None:
        """As `TensorFiles.close`."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._let_go()

    def _file_name(self, name: str) -> str:
        if self._index.file_of is None:
            return self._index.files[0]
        try:
            return self._index.file_of[name]
        except KeyError:
            raise ModelError(f"{self._index.where}: no tensor {name}") from None

    def _holder(self, name: str) -> WeightFile:
        file_name = self._file_name(name)
        file = self._opened(file_name)
        if name not in file.places:
            raise ModelError(f"{self._index.where}: no tensor {name}" + f" in {file_name}" * (self._index.file_of is not None))
        return file

    def _opened(self, file_name: str) -> WeightFile:
        with self._lock:
            if file_name not in self._files:
                self._files[file_name] = self._open_file(file_name)
            return self._files[file_name]
