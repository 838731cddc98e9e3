"""Every error body that leaves the gateway, in the shape of the OpenAI API, and the status that goes with each cause.

`{"error": {"message", "type", "param", "code"}}`: what official clients parse, show and decide retries by. 429 says "you, later",
503 says "nobody to serve you now", 4xx says "not like this". Never tells a client what went wrong inside.
"""

import math

import msgspec
from starlette.responses import Response

from spotserve.core.errors import InvalidRequest, Overloaded, UnknownModel

INTERNAL_MESSAGE = "The server had an error while processing your request."
NOT_READY_RETRY_S = 2.0
"""When to try again while no replica serves and nobody knows better."""


class Problem(msgspec.Struct, frozen=True):
    """The inside of an error body."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None

    def to_json(self) -> bytes:
        """The whole body."""
        return msgspec.json.encode({"error": self})


INTERNAL = Problem(INTERNAL_MESSAGE, "server_error", code="internal_error")


class BodyTooLarge(InvalidRequest):
    """The body has more bytes than this server reads."""


def problem_response(status: int, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """An HTTP response with the problem as its body."""
    return Response(problem.to_json(), status, headers, media_type="application/json")


def invalid_response(error: InvalidRequest) -> Response:
    """The caller's request cannot be served as it stands."""
    match error:
        case UnknownModel():
            status = 404
        case BodyTooLarge():
            status = 413
        case _:
            status = 400
    return problem_response(status, Problem(str(error), "invalid_request_error", error.param, error.code))


def not_found_response(message: str, *, code: str | None = None) -> Response:
    """There is nothing of that name here."""
    return problem_response(404, Problem(message, "invalid_request_error", code=code))


def overloaded_response(error: Overloaded, *, ready: bool) -> Response:
    """429 while the system serves others, 503 while it serves nobody; both say when to come back."""
    if not ready:
        return unavailable_response(str(error), retry_after_s=error.retry_after_s)
    return problem_response(
        429, Problem(str(error), "rate_limit_error", code="rate_limit_exceeded"), _retry_headers(error.retry_after_s)
    )


def unavailable_response(message: str, *, retry_after_s: float = NOT_READY_RETRY_S) -> Response:
    """503: there is nothing to serve with."""
    return problem_response(503, Problem(message, "service_unavailable", code="not_ready"), _retry_headers(retry_after_s))


def failed_problem(error: str | None) -> Problem:
    """A request that was accepted and could not be brought to its end."""
    return Problem(error or INTERNAL_MESSAGE, "server_error", code="request_failed")


CANCELLED = Problem("The request was withdrawn before its end.", "invalid_request_error", code="request_cancelled")


def _retry_headers(retry_after_s: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(retry_after_s))), "retry-after-ms": str(max(1, math.ceil(retry_after_s * 1000)))}
