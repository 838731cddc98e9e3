"""Reading a call's token streams into its choices, and noticing that the client left. Shared by both ways to deliver an answer.

Invariant: a choice that a stop string ended has its request cancelled, once. Does not know what is written for the client.
"""

from collections.abc import Callable

from starlette.types import Receive

from spotserve.core.errors import SpotServeError
from spotserve.gateway.answer import Choice
from spotserve.gateway.calls import TokenSource, TokenStream
from spotserve.gateway.problems import failed_problem


async def read_choice(source: TokenSource, choice: Choice, stream: TokenStream, changed: Callable[[Choice], None]) -> None:
    """Feed one choice until it ends; `changed` is called after every delta."""
    try:
        async for delta in stream:
            choice.take(delta)
            if choice.finish is not None and delta.finish_reason is None:
                source.cancel(choice.request_id)
            changed(choice)
            if choice.finish is not None:
                return
        assert choice.finish is not None, "a token stream ends with a finish reason"
    except SpotServeError as error:
        choice.fail(failed_problem(str(error)))
        changed(choice)


async def client_left(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
