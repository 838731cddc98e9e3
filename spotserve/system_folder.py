"""The folder of one running system: how its processes, and the commands that talk to it, find each other.

    system.json      who leads: process id, URL, address of the controller, shared secret (readable by its owner alone)
    instances.json   machines of the local cloud, so that a restarted one adopts what still runs
    progress.sqlite  the default store
    calibration.json how fast the devices of this machine were found to be
    logs/            one file per process

Files are replaced whole, never edited, so a reader sees the old or the new one.
"""

import os
import secrets
from pathlib import Path

import msgspec

from spotserve.core.errors import ConfigError
from spotserve.core.messages import Address


class SystemRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of `system.json`."""

    pid: int
    url: str
    controller: Address
    secret: str


class SystemFolder:
    """Paths and contents of one system's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def for_port(cls, port: int) -> "SystemFolder":
        """The folder of the system whose gateway listens on `port`: below SPOTSERVE_HOME, or the user's state directory."""
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        home = Path(os.environ.get("SPOTSERVE_HOME") or state / "spotserve")
        return cls(home / str(port))

    @property
    def record_path(self) -> Path:
        """Where `system.json` is."""
        return self.path / "system.json"

    @property
    def instances_path(self) -> Path:
        """Where `instances.json` is."""
        return self.path / "instances.json"

    @property
    def default_store_path(self) -> Path:
        """SQLite file of a system that was not told of another store."""
        return self.path / "progress.sqlite"

    @property
    def calibration_path(self) -> Path:
        """What has been measured of this machine's devices."""
        return self.path / "calibration.json"

    def log_path(self, process: str) -> Path:
        """Log file of a process."""
        return self.path / "logs" / f"{process}.log"

    def create(self) -> None:
        """Makes the folder, for its owner alone."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log_path("any").parent.mkdir(exist_ok=True)

    def secret(self) -> str:
        """The secret of an earlier run in this folder, so that its workers can come back; else a new one."""
        record = self.read()
        return record.secret if record else secrets.token_hex(16)

    def write(self, record: SystemRecord) -> None:
        """Replaces `system.json`."""
        replace_file(self.record_path, msgspec.json.format(msgspec.json.encode(record)))

    def read(self) -> SystemRecord | None:
        """What `system.json` says; None when there is none.

        Raises:
            ConfigError: the file is there and is not what this program writes.
        """
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=SystemRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"{self.record_path} cannot be read: {error}; remove it to start afresh") from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes `content` to `path` so that a crash leaves the old content or the new, readable by the owner alone."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    draft.replace(path)


def process_name(instance_id: str) -> str:
    """Name that a worker gives its process, at most 15 characters, as the kernel keeps them."""
    return f"spot:{instance_id}"[:15]
