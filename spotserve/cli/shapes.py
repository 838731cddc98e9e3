"""Shapes and lists of numbers as users write them."""

import typer

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


def parse_numbers(text: str, flag: str, *, least: int, most: int) -> tuple[int, ...]:
    """Different numbers in ascending order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) <= 6 and least <= int(part) <= most for part in parts):
        raise typer.BadParameter(f"{text}: expected numbers from {least} to {most} with commas between", param_hint=flag)
    return tuple(sorted(set(map(int, parts))))
