"""The weights of a slot from wherever they are: this device's memory first, then peers, then files.

A parameter is put together unit by unit. What one slice in memory has in full is shared without a copy, so that cutting a stage
anew costs no memory for what stays; nothing that is here is asked for, and nothing that a peer gave is read from a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from spotserve.core.messages import Address
from spotserve.engine.catalogue import Catalogue, Entry, Held
from spotserve.engine.cuts import StageSlice
from spotserve.engine.ranks.exchange import Readers
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.ranks.messages import Answer, Offered, ReadWeights, Units

ReadFiles = Callable[[Mapping[str, Held]], Mapping[str, torch.Tensor]]
"""Reads these units of parameters: per parameter the segments' units one after the other along the dimension of its cut."""


@dataclass(frozen=True, slots=True)
class Pull:
    """Take from `rank` what is missing of one layer and it has."""

    layer: int
    rank: Address


@dataclass(slots=True)
class _Parameter:
    """One parameter in the making."""

    entry: Entry
    held: Held
    """What the slot needs of it."""
    value: torch.Tensor | None = None
    missing: list[set[int]] = field(default_factory=list)
    """Units per segment that are not in `value` yet; a parameter that is held whole has one segment of one unit."""

    @property
    def is_complete(self) -> bool:
        return not any(self.missing)

    def next_runs(self) -> Held:
        """Per segment the first units that are missing and follow each other; what is here already is not asked for again."""
        return tuple(_first_run(units) for units in self.missing)

    def runs(self) -> list[Held]:
        """All that is missing, as `next_runs` would give it one after the other."""
        left = [set(units) for units in self.missing]
        found = []
        while any(left):
            found.append(tuple(map(_first_run, left)))
            left = [units - set(run) for units, run in zip(left, found[-1], strict=True)]
        return found

    def shape(self, units: int, segment: int) -> tuple[int, ...]:
        """Of so many units of one segment."""
        shape = list(self.entry.shape)
        if self.entry.cut.segments:
            shape[self.entry.cut.dim] = units * self.entry.cut.segments[segment].unit_size
        return tuple(shape)

    def put(self, segment: int, units: range, piece: torch.Tensor) -> None:
        """Takes over units of one segment."""
        if not self.entry.cut.segments:
            self.value = piece
        else:
            into = self._room(piece)
            wanted = [units if index == segment else range(0) for index in range(len(self.held))]
            self.entry.cut.take(into, self.held, wanted)[0].copy_(piece)
        self.missing[segment] -= set(units)

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        if self.value is None:
            shape = list(self.entry.shape)
            shape[self.entry.cut.dim] = self.entry.cut.size(self.held)
            self.value = like.new_empty(shape)
        return self.value


def assemble(
    catalogue: Catalogue,
    stage_slice: StageSlice,
    *,
    dtype: str,
    memory: RankMemory,
    pulls: Sequence[Pull],
    readers: Readers,
    read_files: ReadFiles,
) -> tuple[dict[str, torch.Tensor], int]:
    """The parameters of a slice by name, and how many bytes of them came from peers.

    Raises:
        PeerLost: a peer is gone.
        ModelError: a file cannot be read.
    """
    parameters = {name: _from_memory(catalogue.entries[name], held, memory) for name, held in catalogue.needed(stage_slice).items()}
    pulled_bytes = 0
    for pull in pulls:
        while missing := [p for p in parameters.values() if p.entry.home == pull.layer and not p.is_complete]:
            given_bytes = _pull(missing, pull.rank, dtype, readers)  # of one slice that the peer holds; it may hold two
            if not given_bytes:
                break
            pulled_bytes += given_bytes
    while unread := {name: p.next_runs() if p.entry.cut.segments else () for name, p in parameters.items() if not p.is_complete}:
        for name, piece in read_files(unread).items():
            _from_file(parameters[name], unread[name], piece)
    return {name: _value(parameter) for name, parameter in parameters.items()}, pulled_bytes


def _from_memory(entry: Entry, held: Held, memory: RankMemory) -> _Parameter:
    parameter = _Parameter(entry, held, missing=[set(units) for units in held] or [{0}])
    here = memory.parts(entry.name)
    for cut, has, tensor in here:
        if not cut.segments or list(has) == list(held):
            return _Parameter(entry, held, tensor, [set() for _ in parameter.missing])
    for cut, has, tensor in here:
        views = _whole_view(cut.take(tensor, has, held)) if all(map(_covers, has, held)) else None
        if views is not None:
            return _Parameter(entry, held, views, [set() for _ in parameter.missing])
    for cut, has, tensor in here:
        for segment, (units, wants) in enumerate(zip(has, held, strict=True)):
            common = sorted(set(units) & set(wants) & parameter.missing[segment])
            if common:
                span = range(common[0], common[-1] + 1)
                (piece,) = cut.take(tensor, has, [span if index == segment else range(0) for index in range(len(held))])
                parameter.put(segment, span, piece)
    return parameter


def _first_run(units: set[int]) -> range:
    if not units:
        return range(0)
    start = min(units)
    return range(start, next(number for number in count(start) if number not in units))


def _covers(has: range, wants: range) -> bool:
    return not wants or (has.start <= wants.start and wants.stop <= has.stop)


def _whole_view(views: list[torch.Tensor]) -> torch.Tensor | None:
    """The part as one view of what is there, when it is in one piece."""
    return views[0] if len(views) == 1 and views[0].is_contiguous() else None


def _pull(parameters: list[_Parameter], rank: Address, dtype: str, readers: Readers) -> int:
    """Asks one peer for what is missing; bytes that it gave."""
    wanted = [(p, run if p.entry.cut.segments else ()) for p in parameters for run in p.runs()]
    request = ReadWeights(
        dtype,
        tuple(p.entry.name for p, _ in wanted),
        tuple(tuple(Units(units.start, units.stop) for units in run) for _, run in wanted),
    )
    pieces: list[tuple[_Parameter, int, range, torch.Tensor]] = []

    def accept(answer: Answer) -> list[torch.Tensor]:
        if isinstance(answer, Offered):
            for (parameter, _), units in zip(wanted, answer.units, strict=True):
                for segment, part in enumerate(units):
                    if part.numbers:
                        empty = torch.empty(parameter.shape(len(part.numbers), segment), dtype=parameter.entry.dtype)
                        pieces.append((parameter, segment, part.numbers, empty))
        return [piece for *_, piece in pieces]

    readers.ask(rank, request, accept)
    for parameter, segment, units, piece in pieces:
        parameter.put(segment, units, piece)
    return sum(piece.nbytes for *_, piece in pieces)


def _from_file(parameter: _Parameter, units: Held, piece: torch.Tensor) -> None:
    if not parameter.entry.cut.segments or list(units) == list(parameter.held):
        parameter.value, parameter.missing = piece, [set() for _ in parameter.missing]
        return
    cut = parameter.entry.cut
    for segment, wanted in enumerate(units):
        if wanted:
            (part,) = cut.take(piece, units, [wanted if index == segment else range(0) for index in range(len(units))])
            parameter.put(segment, wanted, part)


def _value(parameter: _Parameter) -> torch.Tensor:
    assert parameter.is_complete
    assert parameter.value is not None, f"nobody gave {parameter.entry.name}"
    return parameter.value
