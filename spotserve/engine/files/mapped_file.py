"""One safetensors file on this machine, mapped into memory.

The library's own `safe_open` maps the file, and its slices are views of the mapping: only the pages of a slice that are touched
are read from the disk. That is a property of its releases, not a promise, so a test asks the kernel which pages are there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spotserve.core.errors import ModelError
from spotserve.engine.files.header import LENGTH_BYTES, TensorPlace, header_length, parse_header
from spotserve.engine.files.spans import check_spans
from spotserve.engine.files.tensor_files import TensorPart


class MappedFile:
    """The file at `path`, whose header was checked."""

    def __init__(self, path: Path, places: Mapping[str, TensorPlace], where: str) -> None:
        self.places = places
        self._handed_out: list[int] = []
        self._where = where
        try:
            self._handle: Any = safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{where}: cannot be mapped: {error}") from error

    @classmethod
    def open(cls, path: Path) -> "MappedFile":
        """Checks the header against the file's size, then maps it.

        Raises:
            ModelError: the file cannot be read, is no safetensors file, truncated or damaged.
        """
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                length = header_length(file.read(LENGTH_BYTES), size, str(path))
                places = parse_header(file.read(length), size, str(path))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls(path, places, str(path))

    @property
    def bytes_read(self) -> int:
        """Of the parts that were handed out; the kernel reads them when they are touched."""
        return sum(self._handed_out)

    def read(self, name: str, dim: int | None, spans: Sequence[range]) -> torch.Tensor:
        """As `TensorFiles.read`."""
        part = self._part(name, dim, spans)
        self._handed_out.append(part.nbytes)
        return part

    def prefetch(self, parts: Sequence[TensorPart]) -> None:
        """Nothing to do: the kernel reads ahead."""

    def close(self) -> None:
        """Nothing to do: the mapping lasts as long as its tensors."""

    def _part(self, name: str, dim: int | None, spans: Sequence[range]) -> torch.Tensor:
        if dim is None or not spans:
            return _aligned(self._handle.get_tensor(name))
        check_spans(self.places[name].shape, dim, spans, f"{self._where}: tensor {name}")
        view = self._handle.get_slice(name)
        before = (slice(None),) * dim
        views = [view[(*before, slice(span.start, span.stop))] for span in _joined(spans)]
        if len(views) == 1 and views[0].is_contiguous():
            return _aligned(views[0])
        return torch.cat(views, dim) if len(views) > 1 else views[0].contiguous()


def _joined(spans: Sequence[range]) -> list[range]:
    """Spans in their order, those that continue the one before made one with it: a copy less."""
    joined: list[range] = []
    for span in spans:
        if joined and span.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, span.stop)
        else:
            joined.append(span)
    return joined


def _aligned(view: torch.Tensor) -> torch.Tensor:
    """A copy where the file's writer did not pad the header: kernels take addresses to be multiples of the element size."""
    return view.clone() if view.data_ptr() % view.element_size() else view
