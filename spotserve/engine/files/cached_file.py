"""One remote safetensors file: its header and the parts that are wanted come into the cache and are mapped from there."""

from collections.abc import Mapping, Sequence

import torch

from spotserve.engine.files.header import LENGTH_BYTES, TensorPlace, header_length, parse_header
from spotserve.engine.files.mapped_file import MappedFile
from spotserve.engine.files.range_cache import CachedObject, RemoteObject
from spotserve.engine.files.spans import ByteRanges, check_spans, coalesce, part_ranges
from spotserve.engine.files.tensor_files import TensorPart

GAP_BYTES = 2**20
"""Ranges with at most so much between them are fetched as one.

A request to object storage costs 20 to 100 ms before its first byte, in which time one connection carries 1 to 10 MB: up to a
mebibyte it is cheaper to read the gap than to ask twice. So a shard of a matrix's columns reads whole rows (a row is some tens of
kilobytes), and the other shards of the instance find their columns in the cache; stripes further apart are asked for one by one.
"""
_FIRST_BYTES = 2**16
"""What is fetched of a file to begin with: most headers are shorter."""


class CachedFile:
    """The tensors of `remote`, whose bytes `copy` keeps."""

    def __init__(self, remote: RemoteObject, copy: CachedObject) -> None:
        self._copy = copy
        self._where = remote.url
        self.places = self._read_header(remote)
        self._mapped = MappedFile(copy.data_path, self.places, remote.url)

    @property
    def bytes_read(self) -> int:
        """Over the network, by this process."""
        return self._copy.bytes_fetched

    def read(self, name: str, dim: int | None, spans: Sequence[range]) -> torch.Tensor:
        """As `TensorFiles.read`."""
        self._copy.ensure(self._ranges(TensorPart(name, dim, spans)))
        return self._mapped.read(name, dim, spans)

    def prefetch(self, parts: Sequence[TensorPart]) -> None:
        """As `TensorFiles.prefetch`; parts that lie near each other in the file are fetched as one."""
        self._copy.ensure(coalesce((span for part in parts for span in self._ranges(part)), GAP_BYTES))

    def close(self) -> None:
        """Lets others remove the copy."""
        self._copy.close()

    def _ranges(self, part: TensorPart) -> ByteRanges:
        place = self.places[part.name]
        if part.dim is not None and part.spans:
            check_spans(place.shape, part.dim, part.spans, f"{self._where}: tensor {part.name}")
        return part_ranges(place, part.dim, part.spans, GAP_BYTES)

    def _read_header(self, remote: RemoteObject) -> Mapping[str, TensorPlace]:
        self._copy.ensure(coalesce([range(min(_FIRST_BYTES, remote.size_bytes))], 0))
        with self._copy.data_path.open("rb") as file:
            length = header_length(file.read(LENGTH_BYTES), remote.size_bytes, remote.url)
            self._copy.ensure([range(LENGTH_BYTES + length)])
            return parse_header(file.read(length), remote.size_bytes, remote.url)
