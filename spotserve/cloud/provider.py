"""What the controller needs of a cloud."""

from collections.abc import Sequence
from typing import Protocol


class Provider(Protocol):
    """A source of instances. News (launched, notice, lost) goes to the callback that the provider was made with."""

    async def launch(self, count: int, *, spot: bool) -> Sequence[str]:
        """Rents machines; their ids.

        Raises:
            CloudError: the provider refused.
        """
        ...

    async def terminate(self, instance_id: str) -> None:
        """Returns a machine. Harmless when it is gone already."""
        ...

    async def close(self) -> None:
        """Lets go of the provider; rented machines stay."""
        ...
