"""Machines that can be rented, as starting values: what their devices reach, how they are connected, what they cost.

Invariant: every number has its source beside it. Numbers are data, not code: a worker measures its own and replaces them
(`calibration`), and a user's price list replaces these prices. "Data sheet" and "AWS" mean that the number was written down from
memory of what the maker or the cloud publishes; "assumed" that nobody has measured it for us.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from spotserve.core.errors import ConfigError
from spotserve.core.hardware import DeviceType, InstanceType, Link

Known = TypeVar("Known")

_GIB = 2**30
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """One kind of accelerator: a data sheet, and how much of it is reached."""

    memory_mib: int
    half_flops_per_s: float
    """Of the data sheet: dense 16-bit matrix products."""
    single_flops_per_s: float
    """Of the data sheet: 32-bit numbers, without tensor cores."""
    memory_bytes_per_s: float
    """Of the data sheet."""
    half_reached: float
    single_reached: float
    memory_reached: float
    layer_overhead_s: float
    source: str


@dataclass(frozen=True, slots=True)
class KnownInstance:
    """One kind of machine that clouds let."""

    device: str
    num_devices: int
    device_link: Link
    network: Link
    host_memory_gib: int
    host_link: Link
    source: str
    on_demand_usd_per_hour: Mapping[str, float]
    """By region; the first one is what is meant where no place is named."""
    spot_usd_per_hour: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By region: prices of its zones, or the lowest and the highest of them. Zones that ask the on-demand price are left out."""
    price_source: str = ""


_HELIX = "reached: fits of Helix's per-layer tables of LLaMA-2-70B (ASPLOS'25 artifact)"
_VIDUR = "reached: fitted to Vidur's profiles (arXiv 2405.05465), benchmarks/cost_model.py"

DEVICES: dict[str, KnownDevice] = {
    "T4": KnownDevice(16_384, 65e12, 8.1e12, 320e9, 0.40, 0.50, 0.75, 60e-6,
        f"data sheet; 16 bit {_HELIX}; 32 bit and overhead fitted to SpotServe's T4 profiles (its artifact), mean error 6 %"),
    "L4": KnownDevice(22_888, 121e12, 30.3e12, 300e9, 0.41, 0.50, 0.83, 60e-6,
        f"data sheet, memory by SkyPilot's catalogue; {_HELIX}; 32 bit and overhead assumed"),
    "A10G": KnownDevice(22_888, 70e12, 31.2e12, 600e9, 0.55, 0.70, 0.78, 60e-6,
        "data sheet (70 TFLOPS, not the 125 of A10), memory by SkyPilot's catalogue; reached: assumed between L4 and A100"),
    "A40": KnownDevice(49_152, 149.7e12, 37.4e12, 696e9, 0.66, 0.70, 0.83, 124e-6, f"data sheet; {_VIDUR}; 32 bit assumed"),
    "A100-40GB": KnownDevice(40_960, 312e12, 19.5e12, 1_555e9, 0.64, 0.80, 0.79, 72e-6,
        f"data sheet; 16 bit as A100-80GB; memory {_HELIX}; 32 bit assumed"),
    "A100-80GB": KnownDevice(81_920, 312e12, 19.5e12, 2_039e9, 0.64, 0.80, 0.81, 72e-6, f"data sheet; {_VIDUR}; 32 bit assumed"),
    "H100": KnownDevice(81_920, 989e12, 67e12, 3_350e9, 0.59, 0.70, 0.94, 51e-6, f"data sheet; {_VIDUR}; 32 bit assumed"),
    "H200": KnownDevice(144_384, 989e12, 67e12, 4_800e9, 0.59, 0.70, 0.94, 51e-6,
        "data sheet, memory by SkyPilot's catalogue; reached: assumed as H100"),
}  # fmt: skip

_PCIE_T4 = Link(17e-6, 5.1e9)  # fitted to SpotServe's T4 profiles: what is left of a layer on 4 shards beside a quarter of it
_PCIE_NO_NVLINK = Link(30e-6, 10e9)  # assumed: PCIe 4 through the host, twice the T4's
_NVLINK_A100 = Link(23e-6, 168e9)  # fitted to Vidur's DGX A100 all-reduce of 2, 4, 8 devices, mean error 11 %
_NVLINK_H100 = Link(14e-6, 330e9)  # fits of Vidur's DGX H100 all-reduce: 17-31 us, 282-380 GB/s
_ONE_DEVICE = Link(0.0, 1e12)  # nobody to talk to
_HOST_PCIE3 = Link(10e-6, 10e9)  # of 16 GB/s; pinned memory, latency assumed
_HOST_PCIE4 = Link(10e-6, 20e9)  # of 32 GB/s
_HOST_PCIE5 = Link(10e-6, 45e9)  # of 64 GB/s, assumed


def _ethernet(gbit_per_s: float) -> Link:
    """Four fifths of the line, over several TCP streams; latency between what SpotServe's profiles of g4dn.12xlarge have for a hop
    (70 to 150 us) and for each of the two messages of a sum over two machines (about 200 us)."""
    return Link(150e-6, 0.8 * gbit_per_s * 1e9 / 8)


def _fabric(gbit_per_s: float) -> Link:
    """Elastic fabric adapters; latency as fitted to Vidur's all-reduce between two DGX A100."""
    return Link(39e-6, 0.8 * gbit_per_s * 1e9 / 8)


_CATALOGUE = "SkyPilot's catalogue, v8/aws/vms.csv, 00148f2af367"
_EAST = ("us-east-1", "us-east-2", "us-west-2")


def _alike(usd_per_hour: float) -> dict[str, float]:
    return dict.fromkeys(_EAST, usd_per_hour)


INSTANCES: dict[str, KnownInstance] = {
    "g4dn.xlarge": KnownInstance("T4", 1, _ONE_DEVICE, _ethernet(5), 16, _HOST_PCIE3, "AWS; network without bursts",
        _alike(0.526), {
            "us-east-1": (0.2158, 0.2000, 0.2039, 0.2020, 0.2043), "us-east-2": (0.1915, 0.1915, 0.1901),
            "us-west-2": (0.2464, 0.2479, 0.2386)}, _CATALOGUE),
    "g4dn.12xlarge": KnownInstance("T4", 4, _PCIE_T4, _ethernet(50), 192, _HOST_PCIE3, "AWS Batch GPU table",
        _alike(3.912), {"us-east-1": (1.288, 1.413), "us-east-2": (1.122, 1.183), "us-west-2": (1.666, 1.754)},
        f"{_CATALOGUE}; SpotServe (ASPLOS'24) paid 3.912 and 1.9046"),
    "g5.xlarge": KnownInstance("A10G", 1, _ONE_DEVICE, _ethernet(2.5), 16, _HOST_PCIE4, "AWS; network without bursts",
        _alike(1.006), {
            "us-east-1": (0.4507, 0.4246, 0.4360, 0.4259, 0.4364), "us-east-2": (0.3770, 0.3943, 0.3841),
            "us-west-2": (0.4857, 0.5134, 0.4829)}, _CATALOGUE),
    "g5.12xlarge": KnownInstance("A10G", 4, _PCIE_NO_NVLINK, _ethernet(40), 192, _HOST_PCIE4, "AWS Batch GPU table",
        _alike(5.672), {"us-east-1": (2.080, 2.780), "us-east-2": (2.020, 2.039), "us-west-2": (2.757, 3.370)}, _CATALOGUE),
    "g6.12xlarge": KnownInstance("L4", 4, _PCIE_NO_NVLINK, _ethernet(40), 192, _HOST_PCIE4, "AWS",
        _alike(4.6016), {"us-east-1": (1.755, 2.097), "us-east-2": (1.518, 1.757), "us-west-2": (2.316, 2.576)}, _CATALOGUE),
    "p4d.24xlarge": KnownInstance("A100-40GB", 8, _NVLINK_A100, _fabric(400), 1_152, _HOST_PCIE4, "AWS Capacity Blocks page",
        _alike(21.95764), {
            "us-east-1": (2.4655, 8.1915, 8.1203, 7.8799), "us-east-2": (6.0374, 6.0965),
            "us-west-2": (7.9992, 8.2259, 9.7315, 8.4794)}, _CATALOGUE),
    "p4de.24xlarge": KnownInstance("A100-80GB", 8, _NVLINK_A100, _fabric(400), 1_152, _HOST_PCIE4, "AWS; as p4d.24xlarge",
        {"us-east-1": 27.44705, "us-west-2": 27.44705},
        {"us-east-1": (9.9734, 8.6505), "us-west-2": (10.9991, 11.0144, 10.3338)}, _CATALOGUE),
    "p5.48xlarge": KnownInstance("H100", 8, _NVLINK_H100, _fabric(3_200), 2_048, _HOST_PCIE5, "AWS Capacity Blocks page",
        _alike(55.04), {
            "us-east-1": (10.2397, 19.2531, 21.1543, 25.7523, 17.6289), "us-east-2": (11.2543, 11.5616, 11.9912),
            "us-west-2": (12.6935, 12.9785, 12.9727, 16.1301)}, _CATALOGUE),
    "p5en.48xlarge": KnownInstance("H200", 8, _NVLINK_H100, _fabric(3_200), 2_048, _HOST_PCIE5, "AWS; links as p5.48xlarge",
        _alike(63.296), {
            "us-east-1": (17.2074, 18.2492, 16.5551), "us-east-2": (22.9370, 24.2039, 16.2400),
            "us-west-2": (23.8930, 15.4820, 18.3464)}, _CATALOGUE),
    "a2-highgpu-1g": KnownInstance("A100-40GB", 1, _ONE_DEVICE, _ethernet(24), 85, _HOST_PCIE4, "Google Cloud",
        {"us-central1": 3.673}, price_source="Google Cloud's list, from memory; spot not read"),
}  # fmt: skip


def device_type(name: str, *, value_bytes: int = 2) -> DeviceType:
    """A known device, for models of 16-bit numbers, or of 32-bit ones with `value_bytes` 4.

    Raises:
        ConfigError: nobody knows it.
    """
    known = _find(name, DEVICES, "device")
    single = value_bytes >= 4
    return DeviceType(
        name=name,
        memory_bytes=known.memory_mib * _MIB,
        flops_per_s=known.single_flops_per_s * known.single_reached if single else known.half_flops_per_s * known.half_reached,
        memory_bytes_per_s=known.memory_bytes_per_s * known.memory_reached,
        layer_overhead_s=known.layer_overhead_s,
    )


def instance_type(name: str, *, value_bytes: int = 2) -> InstanceType:
    """A known machine; `value_bytes` as in `device_type`.

    Raises:
        ConfigError: nobody knows it; the message lists what is known.
    """
    known = _find(name, INSTANCES, "instance type")
    return InstanceType(
        name=name,
        device=device_type(known.device, value_bytes=value_bytes),
        num_devices=known.num_devices,
        device_link=known.device_link,
        network=known.network,
        host_memory_bytes=known.host_memory_gib * _GIB,
        host_link=known.host_link,
    )


def price_usd_per_hour(name: str, *, spot: bool, zone: str | None = None) -> float:
    """What a machine costs: on demand, or on the spot market the median of the zones of a region.

    Args:
        name: of the instance type.
        spot: whether it may be taken away.
        zone: `us-east-1b`, or a region; None: where it is known best.

    Raises:
        ConfigError: the machine, or its price there, is not known.
    """
    known = _find(name, INSTANCES, "instance type")
    region = next(iter(known.on_demand_usd_per_hour)) if zone is None else _region_of(zone, known.on_demand_usd_per_hour)
    if region is None:
        raise ConfigError(f"{name} has no known price in {zone!r}; there is one in {', '.join(known.on_demand_usd_per_hour)}")
    if not spot:
        return known.on_demand_usd_per_hour[region]
    prices = known.spot_usd_per_hour.get(region)
    if prices is None:
        raise ConfigError(f"{name} has no known spot price in {region}")
    return median(prices)


def _region_of(zone: str, regions: Mapping[str, float]) -> str | None:
    """The region that a zone's name starts with; the longest, since `us-east-1` begins `us-east-10`."""
    return max((region for region in regions if zone.startswith(region)), key=len, default=None)


def _find(name: str, table: Mapping[str, Known], what: str) -> Known:
    if name not in table:
        raise ConfigError(f"{what} {name!r} is not known; known are {', '.join(table)}")
    return table[name]
