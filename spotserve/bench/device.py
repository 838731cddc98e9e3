"""What calibration finds on this machine: the three constants of a device and the link between two ranks, and how well they fit.

    python -m spotserve.bench.device --threads 1 --json

The same measurements and the same fit that a worker makes when it starts (`worker.calibrate`).
"""

import argparse
import socket
import threading
from collections.abc import Sequence
from statistics import median
from time import perf_counter

import msgspec
from pydantic import ValidationError

from spotserve.cloud.local_hardware import LOOPBACK, local_instance_type
from spotserve.config import EngineSettings, LocalCloudSettings
from spotserve.core.errors import ModelError
from spotserve.core.hardware import DeviceType, Link
from spotserve.engine.measure import measure
from spotserve.planner.calibration import LinkSample, Sample, fit_device, fit_link, predicted_s

MESSAGE_BYTES = (64, 2**14, 2**18, 2**22, 2**25)
REPEATS = 7


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement beside what the constants say."""

    work: str
    seconds: float
    predicted_s: float


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One device and the links of this machine."""

    dtype: str
    threads: int
    device: DeviceType
    mean_error: float
    """Mean of |predicted - measured| / measured."""
    figures: tuple[Figure, ...]
    loopback: Link
    loopback_samples: tuple[tuple[int, float], ...]
    """Bytes, and seconds until they were there."""


def device_figures(settings: EngineSettings) -> DeviceFigures:
    """Measures this process's device. Takes a few seconds.

    Raises:
        ModelError: the model that ships cannot be run.
    """
    measured = measure(settings)
    samples = [Sample(each.flops, each.num_bytes, each.num_layers, each.seconds) for each in measured]
    device = fit_device(samples, local_instance_type(LocalCloudSettings()).device)
    figures = []
    for each, seconds in zip(samples, predicted_s(samples, device), strict=True):
        kind = f"step of {each.num_layers:g} layers" if each.num_layers else "kernel"
        work = f"{kind}: {each.flops / 1e6:,.0f} Mflop, {each.num_bytes / 1e6:,.1f} MB"
        figures.append(Figure(work=work, seconds=each.seconds, predicted_s=float(seconds)))
    errors = [abs(each.predicted_s - each.seconds) / each.seconds for each in figures]
    messages = tuple((size, _loopback_s(size)) for size in MESSAGE_BYTES)
    return DeviceFigures(
        dtype=settings.dtype,
        threads=settings.threads,
        device=device,
        mean_error=sum(errors) / len(errors),
        figures=tuple(figures),
        loopback=fit_link([LinkSample(size, seconds) for size, seconds in messages], LOOPBACK),
        loopback_samples=messages,
    )


def _loopback_s(num_bytes: int) -> float:
    """Half of the time until a message of so many bytes has been there and its like has come back."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            echo = threading.Thread(target=_echo, args=(theirs, num_bytes), daemon=True)
            echo.start()
            message, times = bytes(num_bytes), []
            for _ in range(REPEATS + 1):
                started_s = perf_counter()
                ours.sendall(message)
                _read(ours, num_bytes)
                times.append((perf_counter() - started_s) / 2)
            echo.join()
    return median(times[1:])


def _echo(end: socket.socket, num_bytes: int) -> None:
    message = bytes(num_bytes)
    for _ in range(REPEATS + 1):
        _read(end, num_bytes)
        end.sendall(message)


def _read(end: socket.socket, num_bytes: int) -> None:
    into = memoryview(bytearray(min(num_bytes, 2**20)))
    while num_bytes:
        count = end.recv_into(into, min(num_bytes, len(into)))
        if count == 0:
            raise ConnectionResetError("the other end of the loopback hung up")
        num_bytes -= count


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="spotserve doctor", description="How fast the planner takes this machine to be")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"), help="of weights")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of a device")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parsed = parser.parse_args(arguments)
    try:
        figures = device_figures(EngineSettings.model_validate({"dtype": parsed.dtype, "threads": parsed.threads}))
    except (ValidationError, ModelError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    if parsed.json:
        print(msgspec.json.encode(figures).decode())
        return
    device = figures.device
    print(f"one device of this machine, {figures.dtype}, {figures.threads} thread{'' if figures.threads == 1 else 's'}")
    print(f"  compute   {device.flops_per_s / 1e9:10.1f} Gflop/s")
    print(f"  memory    {device.memory_bytes_per_s / 1e9:10.1f} GB/s")
    print(f"  overhead  {device.layer_overhead_s * 1e6:10.0f} us per layer and step")
    print(f"  these three are {figures.mean_error:.0%} off on average:")
    for each in figures.figures:
        print(f"    {each.work:<44}{each.seconds * 1e3:9.2f} ms  predicted {each.predicted_s * 1e3:9.2f} ms")
    print(f"loopback: {figures.loopback.latency_s * 1e6:.0f} us + bytes / {figures.loopback.bytes_per_s / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
