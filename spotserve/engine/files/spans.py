"""Arithmetic on byte ranges: where a part of a tensor lies, what is missing, which ranges are better read as one."""

import math
from collections.abc import Iterable, Sequence

from spotserve.core.errors import ModelError
from spotserve.engine.files.header import TensorPlace

ByteRanges = list[range]
"""In ascending order, none empty, no two that touch."""


def check_spans(shape: Sequence[int], dim: int, spans: Sequence[range], what: str) -> None:
    """Refuses spans that a tensor of this shape does not have.

    Raises:
        ModelError: there is no such dimension, or an index beyond its end.
    """
    if not 0 <= dim < len(shape):
        raise ModelError(f"{what} has shape {list(shape)}: there is no dimension {dim}")
    for span in spans:
        assert span.step == 1, "spans are runs of neighbours"
        if len(span) and not 0 <= span.start <= span.stop <= shape[dim]:
            raise ModelError(
                f"{what} has shape {list(shape)}: indices {span.start} to {span.stop} of dimension {dim} are wanted, "
                f"it has {shape[dim]}"
            )


def part_ranges(place: TensorPlace, dim: int | None, spans: Sequence[range], gap_bytes: int) -> ByteRanges:
    """Byte ranges of the file that hold the `spans` along `dim`, gaps up to `gap_bytes` read along.

    Along a dimension other than 0 a part is a stripe of every row. Stripes that lie no further apart than the gap come out as one
    range over all rows, without listing each.
    """
    if dim is None or not spans:
        return coalesce([range(place.start_byte, place.start_byte + place.num_bytes)], 0)
    index_bytes = math.prod(place.shape[dim + 1 :]) * place.dtype.itemsize
    row_bytes = place.shape[dim] * index_bytes
    num_rows = math.prod(place.shape[:dim])
    stripes = coalesce((range(span.start * index_bytes, span.stop * index_bytes) for span in spans), gap_bytes)
    if not stripes or num_rows == 0:
        return []
    first, last = place.start_byte, place.start_byte + (num_rows - 1) * row_bytes
    if row_bytes - (stripes[-1].stop - stripes[0].start) <= gap_bytes and len(stripes) == 1:
        return [range(first + stripes[0].start, last + stripes[0].stop)]
    starts = range(first, last + 1, row_bytes)
    return coalesce((range(start + stripe.start, start + stripe.stop) for start in starts for stripe in stripes), gap_bytes)


def coalesce(ranges: Iterable[range], gap_bytes: int) -> ByteRanges:
    """The union of `ranges`; neighbours become one when at most `gap_bytes` lie between them."""
    union: list[range] = []
    for each in sorted((each for each in ranges if len(each)), key=lambda each: each.start):
        if union and each.start - union[-1].stop <= gap_bytes:
            union[-1] = range(union[-1].start, max(union[-1].stop, each.stop))
        else:
            union.append(each)
    return union


def subtract(wanted: ByteRanges, present: ByteRanges) -> ByteRanges:
    """What of `wanted` is not in `present`."""
    missing, place = [], 0
    for each in wanted:
        start = each.start
        while place < len(present) and present[place].stop <= start:
            place += 1
        ahead = place
        while ahead < len(present) and present[ahead].start < each.stop:
            if present[ahead].start > start:
                missing.append(range(start, present[ahead].start))
            start = max(start, present[ahead].stop)
            ahead += 1
        if start < each.stop:
            missing.append(range(start, each.stop))
    return missing


def cut_at_grid(ranges: ByteRanges, grid_bytes: int) -> ByteRanges:
    """The same bytes in pieces that do not cross a multiple of `grid_bytes`; these may touch."""
    pieces = []
    for each in ranges:
        start = each.start
        while start < each.stop:
            stop = min(each.stop, (start // grid_bytes + 1) * grid_bytes)
            pieces.append(range(start, stop))
            start = stop
    return pieces
