"""Shapes as users write them."""

from spotserve.core.errors import ConfigError


def parse_shape(option: str, text: str) -> tuple[int | None, int | None, int | None]:
    """Replicas (None: as many as the devices allow), stages and shards (None: the planner chooses)."""
    if text == "auto":
        return None, None, None
    try:
        data, pipeline, tensor = text.split(",")
        shape = None if data == "auto" else int(data), int(pipeline), int(tensor)
    except ValueError as error:
        raise ConfigError(f"{option}{text}: expected three numbers D,P,M such as 4,1,1 or auto,1,1; or auto") from error
    if min(number for number in shape if number is not None) < 1:
        raise ConfigError(f"{option}{text}: expected numbers of at least 1")
    return shape
