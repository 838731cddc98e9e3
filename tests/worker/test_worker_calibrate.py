"""A machine is measured once for all workers of a folder, whatever becomes of the worker that measures."""

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import msgspec
import pytest

from spotserve.cloud.local_hardware import local_instance_type
from spotserve.config import EngineSettings, LocalCloudSettings
from spotserve.core.hardware import DeviceType, InstanceType
from spotserve.system_folder import SystemFolder
from spotserve.worker import calibrate
from spotserve.worker.calibrate import calibrated

SETTINGS = EngineSettings()


@pytest.fixture
def prior() -> InstanceType:
    return local_instance_type(LocalCloudSettings())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SystemFolder:
    """A folder whose measurements are counted in a file beside it, and take no time."""
    its = SystemFolder(tmp_path)
    its.create()

    def measured(device: DeviceType, settings: EngineSettings) -> DeviceType:
        with (tmp_path / "measured").open("a") as log:
            log.write("x")
        time.sleep(0.05)
        return msgspec.structs.replace(device, flops_per_s=5e9)

    monkeypatch.setattr(calibrate, "measured_device", measured)
    return its


def times_measured(folder: SystemFolder) -> int:
    path = folder.path / "measured"
    return len(path.read_text()) if path.exists() else 0


def test_what_was_measured_is_kept(prior: InstanceType, folder: SystemFolder) -> None:
    first = calibrated(prior, SETTINGS, folder)
    assert first.device.flops_per_s == 5e9 and first.device.memory_bytes == prior.device.memory_bytes
    assert calibrated(prior, SETTINGS, folder) == first
    assert times_measured(folder) == 1


def test_other_arithmetic_is_measured_anew(prior: InstanceType, folder: SystemFolder) -> None:
    calibrated(prior, SETTINGS, folder)
    calibrated(prior, SETTINGS.model_copy(update={"threads": 2}), folder)
    calibrated(prior, SETTINGS.model_copy(update={"dtype": "float64"}), folder)
    assert times_measured(folder) == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"dtype": "float32", "threads": 1}', b"\xff"])
def test_a_broken_file_is_measured_anew(content: bytes, prior: InstanceType, folder: SystemFolder) -> None:
    folder.calibration_path.write_bytes(content)
    assert calibrated(prior, SETTINGS, folder).device.flops_per_s == 5e9
    calibrated(prior, SETTINGS, folder)
    assert times_measured(folder) == 1


def test_workers_that_start_together_measure_once(prior: InstanceType, folder: SystemFolder) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=calibrated, args=(prior, SETTINGS, folder)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert times_measured(folder) == 1


def test_a_worker_that_is_killed_while_it_measures_leaves_no_lock(
    prior: InstanceType, folder: SystemFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    measuring: Event = fork.Event()

    def hang(*_: object) -> None:
        measuring.set()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "measured_device", hang)
        worker = fork.Process(target=calibrated, args=(prior, SETTINGS, folder))
        worker.start()
        assert measuring.wait(30)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    assert calibrated(prior, SETTINGS, folder).device.flops_per_s == 5e9
    assert times_measured(folder) == 1
