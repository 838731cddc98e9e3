"""How progress looks as bytes. Token ids are little-endian unsigned 32-bit integers, so that appending tokens is appending bytes.

Everything is binary and of fixed order, so that Redis' Lua can read it as well. Does not know keys, tables or connections.
"""

import struct
import sys
from array import array
from collections.abc import Sequence

from spotserve.core.errors import StoreError
from spotserve.core.request import FinishReason

TOKEN_BYTES = 4

_FINISH_CODES: dict[FinishReason | None, int] = {
    None: 0,
    FinishReason.STOP: 1,
    FinishReason.LENGTH: 2,
    FinishReason.CANCELLED: 3,
    FinishReason.FAILED: 4,
}
_FINISH_REASONS = {code: reason for reason, code in _FINISH_CODES.items()}

_ROW = struct.Struct("<QQBI")
_HEADER = struct.Struct("<QB")


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """4 bytes per token id."""
    tokens = array("I", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """The inverse of `pack_tokens`.

    Raises:
        StoreError: `data` is not a whole number of tokens.
    """
    if len(data) % TOKEN_BYTES:
        raise StoreError(f"{len(data)} stored bytes are not a whole number of tokens")
    tokens = array("I", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)


def finish_code(reason: FinishReason | None) -> int:
    """A small number that stands for `reason` in stores, for good: 0 for None."""
    return _FINISH_CODES[reason]


def finish_reason(code: int) -> FinishReason | None:
    """The inverse of `finish_code`.

    Raises:
        StoreError: no reason has this code.
    """
    if code not in _FINISH_REASONS:
        raise StoreError(f"{code} is not the code of a finish reason")
    return _FINISH_REASONS[code]


def pack_row(*, epoch: int, position: int, finish: FinishReason | None, token_ids: Sequence[int]) -> bytes:
    """One commit for Redis: epoch, position, finish code, number of token bytes, token bytes; in Lua `<I8I8BI4`."""
    tokens = pack_tokens(token_ids)
    return _ROW.pack(epoch, position, _FINISH_CODES[finish], len(tokens)) + tokens


def unpack_value(value: bytes) -> tuple[int, FinishReason | None, tuple[int, ...]]:
    """Epoch, finish reason and token ids of a request as Redis keeps it: a header, in Lua `<I8B`, and the tokens.

    Raises:
        StoreError: this is not how progress looks.
    """
    if len(value) < _HEADER.size:
        raise StoreError(f"{len(value)} stored bytes are too few for progress")
    epoch, code = _HEADER.unpack_from(value)
    return epoch, finish_reason(code), unpack_tokens(value[_HEADER.size :])
