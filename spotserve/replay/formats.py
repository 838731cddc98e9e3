"""Trace files, read into two shapes: a fleet's history and a list of requests.

Which format a file is in shows in its first line that is not a comment, so no flag names it; `capacity_formats` and
`request_formats` have one reader for each. Every bad row is a `TraceError` that names the file, the line and what was expected
there. Knows files; does not know clocks, scaling or what becomes of the rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spotserve.core.errors import TraceError
from spotserve.replay.capacity_formats import CAPACITY_FORMATS
from spotserve.replay.request_formats import REQUEST_FORMATS
from spotserve.replay.rows import Format, Options, rows_of
from spotserve.replay.trace import CapacityTrace, RequestTrace

DEFAULTS = Options()


def parse_capacity(text: str, source: str, options: Options = DEFAULTS) -> CapacityTrace:
    """A capacity trace from its text; `source` names it in errors."""
    trace: CapacityTrace = _parse(text, source, CAPACITY_FORMATS, options)
    return trace


def parse_requests(text: str, source: str, options: Options = DEFAULTS) -> RequestTrace:
    """A request trace from its text; `source` names it in errors."""
    trace: RequestTrace = _parse(text, source, REQUEST_FORMATS, options)
    return trace


def parse_trace(text: str, source: str, options: Options = DEFAULTS) -> CapacityTrace | RequestTrace:
    """A trace of either kind."""
    trace: CapacityTrace | RequestTrace = _parse(text, source, (*CAPACITY_FORMATS, *REQUEST_FORMATS), options)
    return trace


def read_trace_text(path: Path) -> str:
    """The text of a trace file.

    Raises:
        TraceError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: expected a readable UTF-8 file: {error}") from error


def _parse(text: str, source: str, formats: Sequence[Format[Any]], options: Options) -> Any:
    rows = list(rows_of(text, source))
    expected = " or ".join(f"{known.name} ({known.shape})" for known in formats)
    if not rows:
        raise TraceError(f"{source}: expected {expected}, found no rows")
    for known in formats:
        if known.matches(rows[0].text):
            return known.read(rows, options)
    raise rows[0].error(expected)
