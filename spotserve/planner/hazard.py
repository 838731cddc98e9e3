"""The hazards of a fleet: what every instance type in every zone has taught (`cell_book`), and which instances are at raised risk.

Invariant: what is told twice counts once. A notice and the loss that follows are one event, told first by the notice; a notice
that did not come true is taken back; what is returned is not lost.

One owner, mutable. Knows no plans and no clock. Whoever is never told of (on demand) has no hazard.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log

from spotserve.planner.cell_book import HOUR_S, CellBook, HazardPrior
from spotserve.planner.risk import Cell, Risk, Sizes, mean_size


@dataclass(slots=True)
class _Known:
    """An instance that is not gone."""

    cell: tuple[str, str]
    is_doomed: bool = False
    signal_until_s: float = -inf


class HazardBook:
    """The hazards of a fleet. See the module for what it learns and what it ignores."""

    def __init__(self, prior: HazardPrior | None = None) -> None:
        self._prior = HazardPrior() if prior is None else prior
        self._cells: dict[tuple[str, str], CellBook] = {}
        self._instances: dict[str, _Known] = {}
        self._signals = 0
        self._true_signals = 0

    # ------------------------------------------------------------------ what happened

    def note_joined(self, instance_id: str, instance_type: str, zone: str, now_s: float) -> None:
        """A spot instance is there. Harmless when that is known."""
        if instance_id in self._instances:
            return
        cell = self._cells.setdefault((instance_type, zone), CellBook(now_s))
        cell.advance(self._prior, now_s)
        cell.alive[instance_id] = None
        self._instances[instance_id] = _Known((instance_type, zone))

    def note_left(self, instance_id: str, now_s: float) -> None:
        """It was returned, not taken."""
        known = self._instances.pop(instance_id, None)
        if known is None:
            return
        cell = self._cells[known.cell]
        cell.advance(self._prior, now_s)
        cell.alive.pop(instance_id, None)
        if not known.is_doomed and known.signal_until_s > now_s:
            self._signals -= 1  # nobody will know whether it was true

    def note_notice(self, instance_id: str, now_s: float) -> None:
        """The cloud says that it will take this one: that is its loss, known early."""
        known = self._instances.get(instance_id)
        if known is None or known.is_doomed:
            return
        known.is_doomed = True
        self._true_signals += known.signal_until_s > now_s
        self._cells[known.cell].take(self._prior, instance_id, now_s)

    def note_spared(self, instance_id: str, now_s: float) -> None:
        """The notice did not come true."""
        known = self._instances.get(instance_id)
        if known is None or not known.is_doomed:
            return
        known.is_doomed = False
        self._true_signals -= known.signal_until_s > now_s
        self._cells[known.cell].spare(self._prior, instance_id, now_s)

    def note_loss(self, instance_id: str, now_s: float) -> None:
        """It is gone, with or without notice."""
        self.note_notice(instance_id, now_s)
        self._instances.pop(instance_id, None)

    def note_soft(self, instance_id: str, now_s: float) -> None:
        """The cloud says that this one is at raised risk. While one signal holds another one only prolongs it."""
        known = self._instances.get(instance_id)
        if known is None or known.is_doomed:
            return
        self._signals += known.signal_until_s <= now_s
        known.signal_until_s = max(known.signal_until_s, now_s + self._prior.signal_s)

    # ------------------------------------------------------------------ what is believed

    def rate_per_hour(self, instance_type: str, zone: str, now_s: float, over_s: float = 0.0) -> float:
        """Expected losses per hour of one instance of a type in a zone, on average over the next `over_s`."""
        cell = self._cell(instance_type, zone, now_s)
        most = len(cell.alive) or max(size for size, _ in cell.size_shares(self._prior, now_s))
        mean = mean_size(cell.size_shares(self._prior, now_s), most)
        return cell.instants_per_hour(self._prior, now_s, over_s) * mean

    def instance_rate_per_hour(self, instance_id: str, now_s: float) -> float:
        """Expected losses per hour of this instance: 0 when it is not known here, infinite when it is under notice."""
        known = self._instances.get(instance_id)
        if known is None:
            return 0.0
        if known.is_doomed:
            return inf
        signalled = self._signal_per_hour(now_s) if known.signal_until_s > now_s else 0.0
        return self.rate_per_hour(*known.cell, now_s) + signalled

    def group_sizes(self, instance_type: str, zone: str, now_s: float) -> Sizes:
        """How many instances an instant takes there, as (size, share)."""
        return self._cell(instance_type, zone, now_s).size_shares(self._prior, now_s)

    def instants_per_hour(self, instance_type: str, zone: str, now_s: float, over_s: float = 0.0) -> float:
        """Expected loss instants per hour and instance there, on average over the next `over_s`."""
        return self._cell(instance_type, zone, now_s).instants_per_hour(self._prior, now_s, over_s)

    def last_instant_s(self, instance_type: str, zone: str) -> float | None:
        """When something was last taken there; None: never."""
        last_s = self._cell(instance_type, zone, 0.0).last_s
        return None if last_s == -inf else last_s

    def risk(self, now_s: float, over_s: float = 0.0) -> Risk:
        """Everything as one value, with rates on average over the next `over_s`.

        An instance under a soft signal is a cell of its own, at its own rate. Those under notice are in no cell: nobody should
        count on them.
        """
        cells = []
        for (instance_type, zone), book in sorted(self._cells.items()):
            name, each_per_hour = f"{instance_type}/{zone}", book.instants_per_hour(self._prior, now_s, over_s)
            sizes = book.size_shares(self._prior, now_s)
            signalled = [each for each in book.alive if self._instances[each].signal_until_s > now_s]
            others = tuple(each for each in book.alive if self._instances[each].signal_until_s <= now_s)
            if others:
                cells.append(Cell(name, others, each_per_hour * len(others), sizes))
            alone_per_hour = each_per_hour * mean_size(sizes, len(book.alive)) + self._signal_per_hour(now_s)
            cells += [Cell(f"{name}/{each}", (each,), alone_per_hour, ((1, 1.0),)) for each in signalled]
        return Risk(tuple(cells))

    def summary(self, now_s: float) -> list[Mapping[str, str | float | int | None]]:
        """One row of plain numbers per type and zone."""
        rows: list[Mapping[str, str | float | int | None]] = []
        for (instance_type, zone), book in sorted(self._cells.items()):
            calm, stirred = book.coefficients(self._prior, now_s)
            sizes = book.size_shares(self._prior, now_s)
            rows.append(
                {
                    "instance_type": instance_type,
                    "zone": zone,
                    "alive": len(book.alive),
                    "losses_per_instance_hour": self.rate_per_hour(instance_type, zone, now_s),
                    "instants_per_instance_hour": calm,
                    "stirred_instants_per_instance_hour": stirred,
                    "mean_group": mean_size(sizes, max(size for size, _ in sizes)),
                    "instance_hours": book.settled(self._prior, now_s).alive_h,
                    "last_instant_s": None if book.last_s == -inf else book.last_s,
                }
            )
        return rows

    def _cell(self, instance_type: str, zone: str, now_s: float) -> CellBook:
        """What is known there; where nothing is, a book that says what the prior says."""
        return self._cells.get((instance_type, zone)) or CellBook(now_s)

    def _signal_per_hour(self, now_s: float) -> float:
        """What a soft signal adds: the rate at which the believed share of those signalled is lost by the time it lapses."""
        held = sum(not each.is_doomed and each.signal_until_s > now_s for each in self._instances.values())
        prior = self._prior
        told = prior.signal_truth * prior.signal_weight + self._true_signals
        return -log(1 - told / (prior.signal_weight + max(self._signals - held, self._true_signals))) / prior.signal_s * HOUR_S
