"""What a worker process is told when it is started; travels as one line of JSON."""

from pathlib import Path

import msgspec

from spotserve.config import EngineSettings, StoreSettings, WorkerSettings
from spotserve.core.hardware import InstanceType


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of the instance and settings of its process."""

    instance_id: str
    spot: bool
    zone: str
    system_folder: str
    """Where the controller's address and the shared secret are read, again at every attempt to connect."""
    engine: dict[str, object]
    worker: dict[str, object]
    store: dict[str, object]
    devices: int = 1
    """Its devices: the first is this process's own, each further one gets a rank process."""
    host: str = "127.0.0.1"
    """Where it listens for gateways and peers."""
    hardware: InstanceType | None = None
    """What kind of machine it is, as far as that is known before its devices are measured; None: nobody plans with it, and nothing
    is measured."""

    def __repr__(self) -> str:
        """Names the instance alone: settings hold keys."""
        return f"WorkerOptions({self.instance_id!r})"

    @property
    def folder_path(self) -> Path:
        """`system_folder` as a path."""
        return Path(self.system_folder)

    def engine_settings(self) -> EngineSettings:
        """The engine's section."""
        return EngineSettings.model_validate(self.engine)

    def worker_settings(self) -> WorkerSettings:
        """The worker's section."""
        return WorkerSettings.model_validate(self.worker)

    def store_settings(self) -> StoreSettings:
        """The store's section."""
        return StoreSettings.model_validate(self.store)
