"""What `spotserve plan` is asked, checked: machines, a placement, limits, a model."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from spotserve.controller.rehearsal import Machine, Standing
from spotserve.core.cluster import DeviceId
from spotserve.core.cut import misfit
from spotserve.core.errors import ConfigError
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan
from spotserve.planner.devices import instance_type, price_usd_per_hour
from spotserve.planner.drafting import Draft
from spotserve.planner.models import MODELS, named_model

MOST_MACHINES = 20_000
LIMITS = ("ttft", "tpot", "e2e")
DRAFT_TOKENS = 8
"""The longest draft that is thought of."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
_MOST_DIGITS = 9

Positive = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
ReplicaName = Annotated[str, msgspec.Meta(pattern=r"^r-[0-9]{1,9}$")]


class PlacedReplica(msgspec.Struct, frozen=True, kw_only=True):
    """One replica in a placement file, as `spotserve plan --json` writes them."""

    id: ReplicaName | None = None
    """None: named by its place in the file."""
    pipeline: Positive
    tensor: Positive
    batch: Positive = 1
    devices: tuple[str, ...]
    """`i-1/0` is the first device of machine i-1; stage by stage, shard by shard."""
    stage_layers: tuple[Positive, ...] = ()


class PlacementFile(msgspec.Struct, frozen=True):
    """A placement file; what else is in it is not asked."""

    replicas: tuple[PlacedReplica, ...]


def read_model(name: str, dtype: str) -> ModelSpec:
    """The model of this name: one of the planner's table, a folder with a configuration, or a hub id.

    Raises:
        ConfigError: there is none; the message says what is known.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    if name in MODELS:
        return named_model(name)
    command = [sys.executable, "-m", "spotserve.bench.describe", name, "--dtype", dtype]
    # A process of its own: the command line does not load torch.
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if answer.returncode != 0:
        problem = answer.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"--model {name}: {problem}; expected a folder, a hub id, or one of {', '.join(sorted(MODELS))}")
    return msgspec.json.decode(answer.stdout, type=ModelSpec)


def read_machines(text: str, value_bytes: int) -> list[Machine]:
    """Machines i-1, i-2, ... from `TYPE=COUNT[@ZONE][:on-demand]`, several with commas between them.

    Raises:
        ConfigError: a type is not known, or the text is not of this form.
    """
    machines: list[Machine] = []
    for part in text.split(","):
        kind, _, market = part.strip().partition(":")
        kind, _, zone = kind.partition("@")
        name, _, count = kind.partition("=")
        number = _number(count)
        if number is None or number < 1 or market not in ("", "spot", "on-demand"):
            raise ConfigError(f"--devices {part}: expected TYPE=COUNT[@ZONE][:on-demand], such as g4dn.12xlarge=8@us-east-1a")
        if len(machines) + number > MOST_MACHINES:
            raise ConfigError(f"--devices {text}: at most {MOST_MACHINES} machines")
        spot = market != "on-demand"
        try:
            hardware = _hardware(name, value_bytes)
            price = price_usd_per_hour(name, spot=spot, zone=zone or None)
        except ConfigError as error:
            raise ConfigError(f"--devices {part}: {error}") from error
        machines += [
            Machine(f"i-{len(machines) + index + 1}", hardware, price, spot=spot, zone=zone or "zone") for index in range(number)
        ]
    return machines


def _number(text: str) -> int | None:
    """A count or an index in plain digits; None: it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


def _hardware(name: str, value_bytes: int) -> InstanceType:
    """Tables have rates for numbers of two and of four bytes."""
    return instance_type(name, value_bytes=4 if value_bytes >= 4 else 2)


def read_standing(path: Path, machines: Sequence[Machine], model: ModelSpec) -> list[Standing]:
    """Replicas that a placement file says serve.

    Raises:
        ConfigError: the file cannot be read or does not fit machines and model; the message says which replica and why.
    """
    try:
        placed = msgspec.json.decode(path.read_bytes(), type=PlacementFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--from {path}: {error}; expected what `spotserve plan --json` prints") from error
    known = {DeviceId(each.instance_id, index) for each in machines for index in range(each.hardware.num_devices)}
    kinds = {each.instance_id: each.hardware.name for each in machines}
    standing = []
    taken: set[DeviceId] = set()
    names: set[str] = set()
    for number, each in enumerate(placed.replicas, start=1):
        where = f"--from {path}: replica {number}"
        devices = [_device(text, where) for text in each.devices]
        if (problem := misfit(model, each.pipeline, each.tensor)) is not None:
            raise ConfigError(f"{where}: {problem}")
        if each.stage_layers and (len(each.stage_layers) != each.pipeline or sum(each.stage_layers) != model.num_layers):
            raise ConfigError(f"{where}: stage_layers must be {each.pipeline} numbers that sum to {model.num_layers} layers")
        if len(devices) != each.pipeline * each.tensor or len(set(devices)) != len(devices):
            raise ConfigError(f"{where}: expected {each.pipeline} x {each.tensor} different devices, found {len(set(devices))}")
        if strange := [device for device in devices if device not in known or device in taken]:
            raise ConfigError(f"{where}: {strange[0].instance_id}/{strange[0].index} is not there, or another replica has it")
        if len(found := sorted({kinds[device.instance_id] for device in devices})) > 1:
            raise ConfigError(f"{where}: its devices are on machines of several kinds: {', '.join(found)}")
        taken.update(devices)
        name = each.id or f"r-{number}"
        if name in names:
            raise ConfigError(f"{where}: there is another {name}")
        names.add(name)
        hardware = kinds[devices[0].instance_id]
        parallel = Parallel(pipeline=each.pipeline, tensor=each.tensor, max_batch=each.batch, stage_layers=each.stage_layers)
        replica = ReplicaPlan(replica_id=name, parallel=parallel, instance_type=hardware)
        standing.append(Standing(replica, dict(zip(replica.slots, devices, strict=True))))
    return standing


def _device(text: str, where: str) -> DeviceId:
    instance_id, _, index = text.partition("/")
    number = _number(index)
    if not instance_id or number is None:
        raise ConfigError(f"{where}: {text!r} is no device: expected MACHINE/INDEX, such as i-1/0")
    return DeviceId(instance_id, number)


def read_limits(text: str | None) -> dict[str, float]:
    """Limits from `ttft=2,tpot=0.1,e2e=60`, as settings of the controller.

    Raises:
        ConfigError: the text is not of this form.
    """
    limits: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, seconds = part.strip().partition("=")
        try:
            value = float(seconds)
        except ValueError:
            value = 0.0
        if name not in LIMITS or f"{name}_s" in limits or not 0 < value < float("inf"):
            raise ConfigError(f"--slo {part}: expected {' or '.join(f'{each}=SECONDS' for each in LIMITS)}, with commas between")
        limits[f"{name}_s"] = value
    return limits


def read_draft(text: str | None) -> Draft | None:
    """A drafter from `0.7:0.1`: the chance that a drafted token is accepted, and what it costs as a share of a step.

    Raises:
        ConfigError: the text is not of this form.
    """
    if text is None:
        return None
    acceptance, _, share = text.partition(":")
    try:
        chance, cost_share = float(acceptance), float(share)
    except ValueError:
        chance = cost_share = -1.0
    if not (0 <= chance <= 1 and 0 <= cost_share < float("inf")):
        raise ConfigError(f"--draft {text}: expected ACCEPTANCE:SHARE, such as 0.7:0.1; `spotserve advise` measures both")
    return Draft((chance,) * DRAFT_TOKENS, cost_share)
