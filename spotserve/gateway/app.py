"""The gateway as an ASGI application: routes, the edge around them, and which error gets which body.

Holds no state of its own between calls: kill it, build another over the same source, and clients go on. Knows no replicas.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from spotserve.config import GatewaySettings
from spotserve.core.clock import Clock
from spotserve.core.errors import InvalidRequest, Overloaded
from spotserve.gateway.calls import TokenSource
from spotserve.gateway.edge import Edge
from spotserve.gateway.problems import Problem, invalid_response, overloaded_response, problem_response, unavailable_response
from spotserve.gateway.routes import NotReady, Routes
from spotserve.gateway.tokenizer import Tokenizer
from spotserve.system_clock import SystemClock


def create_app(
    source: TokenSource, settings: GatewaySettings, tokenizer: Tokenizer, model_name: str, *, clock: Clock | None = None
) -> FastAPI:
    """The application that serves `source` as `model_name`. Further routers may be included before it runs."""
    app = FastAPI(title="SpotServe", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.include_router(Routes(source, settings, tokenizer, model_name, clock or SystemClock()).router())
    app.add_middleware(Edge, api_key=settings.api_key)

    async def invalid(_request: Request, error: Any) -> Response:
        return invalid_response(error)

    async def overloaded(_request: Request, error: Any) -> Response:
        return overloaded_response(error, ready=source.ready)

    async def not_ready(_request: Request, _error: Any) -> Response:
        return unavailable_response("No replica has loaded the model yet.")

    app.add_exception_handler(InvalidRequest, invalid)
    app.add_exception_handler(Overloaded, overloaded)
    app.add_exception_handler(NotReady, not_ready)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _field_errors)
    return app


async def _http_error(request: Request, error: Any) -> Response:
    """No such route, or no such method on it."""
    code: str | None = None
    match error.status_code:
        case 404 if error.detail == "Not Found":  # what the router says; a route that found nothing says what
            message, code = f"Invalid URL ({request.method} {request.url.path})", "not_found"
        case 405:
            message, code = f"Not allowed to {request.method} on {request.url.path}", "method_not_allowed"
        case _:
            message = str(error.detail)
    return problem_response(error.status_code, Problem(message, "invalid_request_error", code=code), error.headers)


async def _field_errors(_request: Request, error: Any) -> Response:
    """A body or parameter that a typed route refused."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return problem_response(400, Problem(f"Invalid value for '{param or 'body'}': {first['msg']}.", "invalid_request_error", param))
