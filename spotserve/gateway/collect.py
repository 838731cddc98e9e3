"""An answer in one piece: wait for every choice, or for the client to leave.

Invariant: a client that leaves a call which is not streamed can never read its answer, so nothing of it goes on; and the call ends
released or detached, never both. Knows no JSON.
"""

import asyncio
from collections.abc import Sequence

from starlette.types import Receive

from spotserve.gateway.answer import Answer, Choice
from spotserve.gateway.calls import TokenSource, TokenStream
from spotserve.gateway.problems import Problem
from spotserve.gateway.reading import client_left, read_choice


class ClientLeft(Exception):
    """Nobody is there to read the answer."""


async def collect(source: TokenSource, answer: Answer, streams: Sequence[TokenStream], receive: Receive) -> Problem | None:
    """Read all choices to their ends and release the call; the problem of the first choice that has no proper end.

    Raises:
        ClientLeft: the client closed its connection; the requests are cancelled and the call is detached.
    """
    done = asyncio.Event()

    def changed(choice: Choice) -> None:
        if choice.finish is not None and (choice.finish.problem or all(other.finish for other in answer.choices)):
            done.set()

    async def watch() -> None:
        await client_left(receive)
        done.set()

    complete = False
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(watch(), name=f"watch {answer.call_id}")]
            for choice, stream in zip(answer.choices, streams, strict=True):
                tasks.append(group.create_task(read_choice(source, choice, stream, changed), name=f"read {choice.request_id}"))
            await done.wait()
            for task in tasks:
                task.cancel()
        problem = next((choice.finish.problem for choice in answer.choices if choice.finish and choice.finish.problem), None)
        complete = problem is not None or all(choice.finish for choice in answer.choices)
    finally:
        for choice in answer.choices:
            if choice.finish is None:
                source.cancel(choice.request_id)
        (source.release if complete else source.detach)(answer.call_id)
    if not complete:
        raise ClientLeft
    return problem
