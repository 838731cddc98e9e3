"""Every entry of the tables is sane and says where it comes from."""

from itertools import pairwise

import pytest

from spotserve.core.errors import ConfigError
from spotserve.planner.devices import DEVICES, INSTANCES, device_type, instance_type, price_usd_per_hour


@pytest.mark.parametrize("name", DEVICES)
def test_devices_reach_less_than_their_data_sheet_and_have_a_source(name: str) -> None:
    known = DEVICES[name]
    assert "data sheet" in known.source and len(known.source) > 20
    assert all(0.3 <= reached < 1 for reached in (known.half_reached, known.single_reached, known.memory_reached))
    half, single = device_type(name), device_type(name, value_bytes=4)
    assert 1e10 < half.memory_bytes < 2e11
    assert 2e13 < half.flops_per_s < 1e15 and half.flops_per_s > 1.5 * single.flops_per_s
    assert 2e11 < half.memory_bytes_per_s == single.memory_bytes_per_s < 5e12
    assert 2e-5 < half.layer_overhead_s < 2e-4


@pytest.mark.parametrize("name", INSTANCES)
def test_machines_are_built_of_known_devices_and_have_a_source(name: str) -> None:
    known, machine = INSTANCES[name], instance_type(name)
    assert known.source and known.price_source
    assert machine.name == name and machine.device.name == known.device and machine.device == device_type(known.device)
    assert machine.num_devices in (1, 4, 8)
    assert machine.host_memory_bytes >= machine.num_devices * 15 * 2**30
    assert 1e8 < machine.network.bytes_per_s < 5e11 and 1e-5 < machine.network.latency_s < 1e-3
    assert 5e9 < machine.host_link.bytes_per_s < 6.4e10
    if machine.num_devices > 1:
        assert machine.device_link.latency_s < machine.network.latency_s
        assert machine.device_link.bytes_per_s >= 5e9


@pytest.mark.parametrize("name", INSTANCES)
def test_spot_is_cheaper_than_on_demand_everywhere(name: str) -> None:
    known = INSTANCES[name]
    assert known.spot_usd_per_hour.keys() <= known.on_demand_usd_per_hour.keys()
    for region, prices in known.spot_usd_per_hour.items():
        on_demand = price_usd_per_hour(name, spot=False, zone=region)
        assert 0.1 * on_demand < min(prices) <= price_usd_per_hour(name, spot=True, zone=region) <= max(prices) < on_demand


def test_a_price_is_that_of_the_region_of_a_zone() -> None:
    assert price_usd_per_hour("g4dn.12xlarge", spot=False) == 3.912
    assert price_usd_per_hour("g4dn.12xlarge", spot=True, zone="us-east-2a") == pytest.approx((1.122 + 1.183) / 2)
    assert price_usd_per_hour("g4dn.xlarge", spot=True) == 0.2039, "the median of five zones"


def test_what_is_not_known_is_refused_with_what_is() -> None:
    with pytest.raises(ConfigError, match=r"'g9\.large' is not known; known are g4dn\.xlarge"):
        instance_type("g9.large")
    with pytest.raises(ConfigError, match="known are T4"):
        device_type("TPU")
    with pytest.raises(ConfigError, match="no known price in 'mars-1'; there is one in us-east-1"):
        price_usd_per_hour("p5.48xlarge", spot=True, zone="mars-1")
    with pytest.raises(ConfigError, match="no known spot price in us-central1"):
        price_usd_per_hour("a2-highgpu-1g", spot=True)


def test_memory_that_is_rented_is_in_the_same_order_as_its_price() -> None:
    """A table with a slipped column would not be monotonous."""
    by_price = sorted(INSTANCES, key=lambda name: price_usd_per_hour(name, spot=False))
    rented = [instance_type(name).device.memory_bytes_per_s * instance_type(name).num_devices for name in by_price]
    assert sum(a <= b for a, b in pairwise(rented)) >= len(rented) - 4
