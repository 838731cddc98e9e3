"""Ranks in one process, joined by real links: what a replica of several processes is, without the processes."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from spotserve.engine.ranks.group import Group, GroupPlan, Place
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.ranks.server import RankServer

SECRET = "of the ranks"
PATIENCE_S = 20.0

Result = TypeVar("Result")


class Seat:
    """One device: its memory and where it listens."""

    def __init__(self) -> None:
        self.memory = RankMemory()
        self.server = RankServer("127.0.0.1", self.memory, secret=SECRET)
        self.server.start()


@contextmanager
def seats(count: int) -> Iterator[list[Seat]]:
    """So many devices, until the end of the block."""
    made = [Seat() for _ in range(count)]
    try:
        yield made
    finally:
        for seat in made:
            seat.server.close()


def places(pipeline: int, tensor: int) -> list[Place]:
    """Every (stage, shard), stage by stage."""
    return [(stage, shard) for stage in range(pipeline) for shard in range(tensor)]


@contextmanager
def joined(made: Sequence[Seat], pipeline: int, tensor: int, *, group_id: str = "r-1@1") -> Iterator[list[Group]]:
    """A group over the first devices, joined; its members by place."""
    addresses = {place: seat.server.address for place, seat in zip(places(pipeline, tensor), made, strict=False)}
    groups = []
    for place, seat in zip(places(pipeline, tensor), made, strict=False):
        group = Group(
            GroupPlan(group_id=group_id, pipeline=pipeline, tensor=tensor, place=place, leads=place == (0, 0), addresses=addresses)
        )
        seat.server.expect(group)
        groups.append(group)
    with ExitStack() as at_end:
        for group in groups:
            at_end.callback(group.break_off, "the test is over")
        deadline_s = time.monotonic() + PATIENCE_S
        together([lambda group=group: group.join(secret=SECRET, deadline_s=deadline_s) for group in groups])  # type: ignore[misc]
        yield groups


def together(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """Runs functions side by side, each in a thread of its own; their results. A function that hangs fails the test."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(timeout=PATIENCE_S) for future in [pool.submit(function) for function in work]]


def in_background(function: Callable[[], object]) -> "threading.Thread":
    """Runs a function that the test does not wait for."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread
