"""Starts workers by fork from a process that has already imported what they need.

Importing torch and transformers takes seconds of processor time, which on a small machine the running workers would feel; a
fork takes milliseconds. The nursery imports, runs no tensor operation and no thread, and then forks a worker for each line
of JSON on its standard input:

    {"options": {...WorkerOptions...}, "log": "/path/of/i-1.log"}   ->   {"instance_id": "i-1", "pid": 4711}
                                                   when it ends:   ->   {"pid": 4711, "exit_code": -9}

Workers lead sessions of their own and outlive the nursery. End of input ends the nursery alone.
"""

import os
import selectors
import signal
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from spotserve.config import EngineSettings
from spotserve.engine.preload import compile_for, preload
from spotserve.worker.app import main as run_worker
from spotserve.worker.options import WorkerOptions


class Order(msgspec.Struct, frozen=True):
    """One line of input."""

    options: WorkerOptions
    log: str


class Born(msgspec.Struct, frozen=True):
    """A worker was started."""

    instance_id: str
    pid: int


class Ended(msgspec.Struct, frozen=True):
    """A worker has ended; a negative exit code is the signal that killed it."""

    pid: int
    exit_code: int


def _say(message: msgspec.Struct) -> None:
    os.write(sys.stdout.fileno(), msgspec.json.encode(message) + b"\n")


def _become_worker(order: Order) -> NoReturn:
    """In the child: a session, a log and signal handling of its own, then the worker until it ends."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(Path(order.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    exit_code = 1
    try:
        exit_code = run_worker(order.options)
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


def _reap() -> None:
    """Says which children have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(Ended(pid, os.waitstatus_to_exitcode(status)))


def main() -> None:
    """Serves orders until the end of input."""
    preload()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the leader, which decides what ends
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    decoder = msgspec.json.Decoder(Order)
    prepared: list[EngineSettings] = []
    rest = b""
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 1024)
                _reap()
                continue
            data = os.read(key.fd, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                order = decoder.decode(line)
                settings = order.options.engine_settings()
                if settings not in prepared:
                    prepared.append(settings)
                    compile_for(settings)
                pid = os.fork()
                if pid == 0:
                    _become_worker(order)
                _say(Born(order.options.instance_id, pid))


if __name__ == "__main__":
    main()
