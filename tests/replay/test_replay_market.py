"""What can be rented of a trace, and the bill."""

from spotserve.replay.market import Market
from spotserve.replay.outcome import Lease
from spotserve.replay.scenario import Prices

PRICES = Prices(spot_usd_per_hour=1.0, on_demand_usd_per_hour=3.0)


def market(**offers: str) -> Market:
    """Machines on offer, by name; the values are zones."""
    made = Market(PRICES)
    for name, zone in offers.items():
        made.offer(name, zone)
    return made


def test_the_oldest_machine_of_the_zone_is_rented_once() -> None:
    given = market(m0="a", m1="b", m2="b")
    assert given.rent_spot(0.0, "b") == ("m1", "b")
    assert given.rent_spot(0.0) == ("m0", "a")
    assert given.rent_spot(0.0, "a") is None
    assert given.rent_spot(0.0) == ("m2", "b")
    assert given.rent_spot(0.0) is None and given.num_rented == 3


def test_what_is_given_back_can_be_had_again_under_another_name_until_it_is_announced() -> None:
    given = market(m0="a")
    assert given.rent_spot(0.0) == ("m0", "a")
    given.end("m0", 60.0)
    assert given.rent_spot(90.0) == ("m0~2", "a")
    assert given.announce("m0", 120.0) == "m0~2"
    given.end("m0~2", 100.0)
    assert given.rent_spot(110.0) is None, "nobody rents what is about to go"
    assert given.withdraw("m0") is None
    assert given.leases == [Lease("m0", True, 0.0, 60.0, 1.0), Lease("m0~2", True, 90.0, 100.0, 1.0)]


def test_on_demand_machines_can_always_be_had_and_everything_is_paid_for_to_the_end() -> None:
    given = market(m0="a")
    given.rent_spot(0.0)
    assert [given.rent_on_demand(10.0), given.rent_on_demand(20.0)] == ["on-demand-1", "on-demand-2"]
    given.end("on-demand-1", 30.0)
    given.end("on-demand-1", 40.0)
    given.end_all(50.0)
    assert given.num_rented == 0
    assert sorted((each.instance, each.from_s, each.until_s, each.usd_per_hour) for each in given.leases) == [
        ("m0", 0.0, 50.0, 1.0),
        ("on-demand-1", 10.0, 30.0, 3.0),
        ("on-demand-2", 20.0, 50.0, 3.0),
    ]
