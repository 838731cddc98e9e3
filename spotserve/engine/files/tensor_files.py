"""What every source of weights can do."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch


class TensorPart(NamedTuple):
    """Index ranges along one dimension of a named tensor; no dimension or no spans: the whole tensor."""

    name: str
    dim: int | None = None
    spans: Sequence[range] = ()


class TensorFiles(Protocol):
    """The tensors of one model, read in parts. Safe to use from several threads."""

    @property
    def config_folder(self) -> Path:
        """A local folder with `config.json` and, where the model has them, generation configuration and tokenizer."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes that this object made the machine read so far: of tensors from a local file system; over the network with a
        remote source, where bytes that another process brought do not count."""
        ...

    def names(self) -> Collection[str]:
        """Every tensor of the model, as its files name it.

        Raises:
            ModelError: the files cannot be read, or are damaged.
        """
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor.

        Raises:
            ModelError: there is no such tensor; its file cannot be read, or is damaged.
        """
        ...

    def dtype(self, name: str) -> torch.dtype:
        """As stored.

        Raises:
            ModelError: as `shape`.
        """
        ...

    def read(self, name: str, dim: int | None = None, spans: Sequence[range] = ()) -> torch.Tensor:
        """The `spans` of indices along `dim`, put together along `dim` in the order given; else the whole tensor.

        The result is contiguous and belongs to the caller. One span along dimension 0, or the whole, is a private mapping of the
        file: no byte is read before it is touched, and writing to it changes the caller's view only.

        Raises:
            ModelError: as `shape`; the tensor has no such dimension or indices; the source cannot be reached.
        """
        ...

    def prefetch(self, parts: Iterable[TensorPart]) -> None:
        """Brings the bytes of all `parts` here at once, so that `read` does not wait for them one by one; returns when they are
        here. With local files there is nothing to do.

        Raises:
            ModelError: as `read`.
        """
        ...

    def close(self) -> None:
        """Lets go of files and connections. Tensors that were read stay valid."""
        ...
