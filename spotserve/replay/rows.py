"""Lines of a trace file, with what an error message needs, and what a file leaves open."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Generic, TypeVar

from spotserve.core.errors import TraceError

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Options:
    """What no file says, or not every file."""

    seed: int = 0
    """Draws which instance goes where a file tells only how many are left."""
    tick_s: float | None = None
    """Time between two counts of a file that lists them; None: as the file says."""
    output_tokens: int = 128
    """Of requests whose file does not say (SpotServe's queries; 128 in its paper)."""

    def __post_init__(self) -> None:
        if self.tick_s is not None and not 0 < self.tick_s < float("inf"):
            raise TraceError(f"tick_s={self.tick_s!r}: expected a positive number of seconds")
        if self.output_tokens < 1:
            raise TraceError(f"output_tokens={self.output_tokens!r}: expected a whole number from 1 on")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file that is neither blank nor a comment."""

    source: str
    line: int
    text: str

    @property
    def fields(self) -> list[str]:
        """What is between commas."""
        return [field.strip() for field in self.text.split(",")]

    def error(self, expected: str) -> TraceError:
        """The row is not what it should be."""
        told = self.text if len(self.text) <= 120 else f"{self.text[:117]}..."
        return TraceError(f"{self.source}:{self.line}: expected {expected}, got {told!r}")

    def number(self, text: object, name: str) -> float:
        """A finite number that is not negative."""
        try:
            value = float(text)  # type: ignore[arg-type]
        except (ValueError, TypeError, OverflowError):
            raise self.error(f"a number as {name}") from None
        if not isfinite(value) or value < 0 or isinstance(text, bool):
            raise self.error(f"a finite {name} that is not negative")
        return value

    def count(self, text: object, name: str, *, largest: int = 2**31) -> int:
        """A whole number that is not negative; of text, in plain digits."""
        if isinstance(text, str):
            value = int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else -1
        else:
            value = text if isinstance(text, int) and not isinstance(text, bool) else -1
        if not 0 <= value <= largest:
            raise self.error(f"a whole number from 0 to {largest} as {name}")
        return value

    def columns(self, count: int) -> list[str]:
        """Its fields, of which there must be so many."""
        fields = self.fields
        if len(fields) != count:
            raise self.error(f"{count} columns")
        return fields


@dataclass(frozen=True, slots=True)
class Format(Generic[Parsed]):
    """How one format is recognised and read."""

    name: str
    shape: str
    """What its lines look like, for people."""
    matches: Callable[[str], bool]
    """Whether this is its first line."""
    read: Callable[[Sequence[Row], Options], Parsed]


def rows_of(text: str, source: str) -> Iterator[Row]:
    """Lines that are neither blank nor a comment."""
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield Row(source, number, stripped)


def full_match(pattern: str) -> Callable[[str], bool]:
    """Whether a line is of this form."""
    compiled = re.compile(pattern)
    return lambda line: compiled.fullmatch(line) is not None
