"""What the controller needs of a cloud."""

from collections.abc import Sequence
from typing import Protocol


class Provider(Protocol):
    """A source of instances. News (launched, notice, lost) goes to the callback that the provider was made with."""

    async def launch(self, count: int, *, spot: bool, zone: str | None = None) -> Sequence[str]:
        """Rents machines in `zone` (None: wherever the provider likes); their ids.

        Raises:
            CloudError: the provider refused, or has no such zone. Machines that had started by then stay, and have been told of.
        """
        ...

    async def terminate(self, instance_id: str) -> None:
        """Returns a machine. Harmless when it is gone already."""
        ...

    async def close(self) -> None:
        """Lets go of the provider; rented machines stay."""
        ...
