"""The header of a safetensors file: names, dtypes, shapes and places, checked against the file's size before anything is mapped.

Format (https://huggingface.co/docs/safetensors): 8 bytes, the header's length as a little-endian unsigned integer; the header, a
JSON object from name to dtype, shape and [begin, end) offsets; then the tensors' bytes, to which the offsets are relative.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from spotserve.core.errors import ModelError

LENGTH_BYTES = 8
"""Of the number in front of the header."""
MAX_HEADER_BYTES = 100_000_000
"""What the library itself accepts."""
METADATA_KEY = "__metadata__"

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""The format's names of the dtypes that can be read."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor lies in its file, elements in row-major order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start_byte: int
    """From the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """Bytes of the header, from the file's first eight.

    Raises:
        ModelError: the file is too short for what it claims.
    """
    if file_bytes < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise ModelError(f"{where}: {file_bytes} bytes are no safetensors file: its first 8 are the length of its header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{where}: no safetensors file: its header would be {length} bytes long, at most {MAX_HEADER_BYTES} are")
    if length + LENGTH_BYTES > file_bytes:
        raise ModelError(f"{where}: truncated: its header should be {length} bytes long, the whole file is {file_bytes}")
    return length


def parse_header(header: bytes, file_bytes: int, where: str) -> Mapping[str, TensorPlace]:
    """The tensors of a file of `file_bytes`, from the bytes of its header.

    Raises:
        ModelError: the header is damaged, contradicts itself or the file's size, or names a dtype that cannot be read.
    """
    try:
        raw: dict[str, Any] = msgspec.json.decode(header, type=dict[str, Any])
        entries = {name: msgspec.convert(value, _Entry) for name, value in raw.items() if name != METADATA_KEY}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{where}: its header is damaged: {error}") from error
    data_start = LENGTH_BYTES + len(header)
    places = {name: _place(entry, data_start, f"{where}: tensor {name}") for name, entry in entries.items()}
    end = data_start
    for name, place in sorted(places.items(), key=lambda item: (item[1].start_byte, item[1].num_bytes)):
        if place.start_byte != end:
            raise ModelError(f"{where}: tensor {name} begins at byte {place.start_byte}, expected {end}, where the one before ends")
        end += place.num_bytes
    if end > file_bytes:
        raise ModelError(f"{where}: truncated: its header describes {end} bytes, the file has {file_bytes}")
    if end < file_bytes:
        raise ModelError(f"{where}: damaged: its header describes {end} bytes, the file has {file_bytes}")
    return MappingProxyType(places)


def _place(entry: _Entry, data_start: int, what: str) -> TensorPlace:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ModelError(f"{what} has dtype {entry.dtype!r}, expected one of {', '.join(DTYPES)}")
    start, end = entry.data_offsets
    if min(entry.shape, default=0) < 0 or start < 0:
        raise ModelError(f"{what} has shape {list(entry.shape)} from byte {start}: negative numbers make no sense")
    place = TensorPlace(dtype, entry.shape, data_start + start)
    if end - start != place.num_bytes:
        raise ModelError(f"{what} of shape {list(entry.shape)} needs {place.num_bytes} bytes, its offsets hold {end - start}")
    return place
