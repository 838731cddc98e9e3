"""How fast this machine's devices are: measured by the first worker that needs it, then known to all of the same folder.

Workers of one machine start together. They take turns at a lock that ends with the process which holds it, so one measures
while the others wait, and none measures the noise of another.
"""

import fcntl
import os
from pathlib import Path

import msgspec

from spotserve.config import EngineSettings
from spotserve.core.hardware import DeviceType, InstanceType
from spotserve.engine.measure import measure
from spotserve.planner.calibration import Sample, fit_device
from spotserve.system_folder import SystemFolder, replace_file


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of `calibration.json`."""

    dtype: str
    threads: int
    device: DeviceType
    on: str = "cpu"
    """What it was measured on, as `EngineSettings.device` names it."""


def calibrated(prior: InstanceType, settings: EngineSettings, folder: SystemFolder) -> InstanceType:
    """`prior` with the speed of its device as measured, here or by another worker before. Takes about a second when it measures.

    Raises:
        ModelError: the model that ships cannot be run.
    """
    path = folder.calibration_path
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        known = _read(path)
        if known is None or (known.dtype, known.threads, known.on) != (settings.dtype, settings.threads, settings.device):
            device = measured_device(prior.device, settings)
            known = Calibration(dtype=settings.dtype, threads=settings.threads, device=device, on=settings.device)
            replace_file(path, msgspec.json.format(msgspec.json.encode(known)))
    finally:
        os.close(descriptor)
    device = msgspec.structs.replace(known.device, name=prior.device.name, memory_bytes=prior.device.memory_bytes)
    return msgspec.structs.replace(prior, device=device)


def measured_device(prior: DeviceType, settings: EngineSettings) -> DeviceType:
    """The constants of this process's device; those that the measurements say nothing about stay those of `prior`.

    Raises:
        ModelError: the model that ships cannot be run.
    """
    samples = [Sample(each.flops, each.num_bytes, each.num_layers, each.seconds) for each in measure(settings)]
    return fit_device(samples, prior)


def _read(path: Path) -> Calibration | None:
    """What was measured before; None: nothing, or nothing that can be read, and is measured anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError):
        return None
