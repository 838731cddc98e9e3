"""Where a simulated fleet gets its machines: a capacity trace says what can be had, and when it is taken back.

Two ways to use it: *all* that the trace has is rented as soon as it is there, or only what is asked for. Machines on demand can
always be had. Owner of what is on offer, and of the bill.
"""

from dataclasses import dataclass

from spotserve.replay.outcome import Lease
from spotserve.replay.scenario import Prices


@dataclass(slots=True)
class _Offer:
    """A spot machine that the trace has at present."""

    name: str
    zone: str
    instance_id: str | None = None
    """Who it is to us; None: nobody has rented it."""
    num_rented: int = 0
    deadline_s: float | None = None
    """When it will be taken, once that is known: nobody rents it any more."""


class Market:
    """Spot machines by trace, and what is paid for."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self._offers: dict[str, _Offer] = {}
        self._num_on_demand = 0
        self._open: dict[str, tuple[bool, float, float]] = {}
        """By instance: spot, since when, for how much."""
        self.leases: list[Lease] = []
        """Those that have ended."""

    @property
    def num_rented(self) -> int:
        """Machines that are paid for at present."""
        return len(self._open)

    def offer(self, name: str, zone: str) -> None:
        """The trace has one more."""
        self._offers[name] = _Offer(name, zone)

    def announce(self, name: str, deadline_s: float) -> str | None:
        """It will be taken; who that is to us, if anybody."""
        offer = self._offers[name]
        offer.deadline_s = deadline_s
        return offer.instance_id

    def withdraw(self, name: str) -> str | None:
        """The trace has it no more; who that was to us, if anybody."""
        return self._offers.pop(name).instance_id

    def rent_spot(self, now_s: float, zone: str | None = None) -> tuple[str, str] | None:
        """One of those on offer that nobody has, the oldest first: (instance, zone); None: there is none."""
        for offer in self._offers.values():
            if offer.instance_id is None and offer.deadline_s is None and zone in (None, offer.zone):
                offer.num_rented += 1
                offer.instance_id = offer.name if offer.num_rented == 1 else f"{offer.name}~{offer.num_rented}"
                self._open[offer.instance_id] = (True, now_s, self._prices.spot_usd_per_hour)
                return offer.instance_id, offer.zone
        return None

    def rent_on_demand(self, now_s: float) -> str:
        """One that stays until it is given back."""
        self._num_on_demand += 1
        instance_id = f"on-demand-{self._num_on_demand}"
        self._open[instance_id] = (False, now_s, self._prices.on_demand_usd_per_hour)
        return instance_id

    def end(self, instance_id: str, now_s: float) -> None:
        """It is paid for no longer; harmless when that is so."""
        bill = self._open.pop(instance_id, None)
        if bill is None:
            return
        spot, from_s, usd_per_hour = bill
        self.leases.append(Lease(instance_id, spot, from_s, now_s, usd_per_hour))
        for offer in self._offers.values():
            if offer.instance_id == instance_id:
                offer.instance_id = None

    def end_all(self, now_s: float) -> None:
        """The replay is over."""
        for instance_id in list(self._open):
            self.end(instance_id, now_s)
