"""The service as an ASGI application: routes, their guards, and what happens at start and end."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

import forcingkv
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import SessionError
from forcingkv.serve.access import check_client
from forcingkv.serve.http_videos import Used, allowed, refused, router
from forcingkv.serve.messages import schema
from forcingkv.serve.refusals import Code, RefusalError, refusal_of
from forcingkv.serve.service import Service, service_of
from forcingkv.serve.sockets import converse

PAGE = Path(__file__).parent / "page"
log = logging.getLogger("forcingkv.serve")

HEADERS = {
    # The page loads nothing from elsewhere, and nothing puts it into a frame.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data: blob:",
            "media-src 'self' blob:",
            "connect-src 'self'",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

plain = APIRouter(tags=["service"])


@plain.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@plain.get("/readyz")
async def readyz(service: Used) -> dict[str, int | str]:
    """Whether something new may begin, and how much."""
    places = service.engine.places
    if service.engine.draining:
        raise RefusalError("draining", "The service is about to end.", service.settings.limits.drain)
    return {"status": "ready", "sessions": places.held, "most": places.most, "waiting": places.waiting}


@plain.get("/metrics", dependencies=[Depends(allowed)])
async def metrics(service: Used) -> Response:
    """Numbers for Prometheus."""
    return Response(service.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@plain.get("/v1/protocol")
async def protocol() -> dict[str, object]:
    """The JSON schema of live sessions."""
    return schema()


@plain.get("/v1/models", dependencies=[Depends(allowed)])
async def models(service: Used) -> dict[str, object]:
    """The bundles, as OpenAI's clients list models."""
    names = service.engine.bundles
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "owned_by": "forcingkv"} for name in names],
    }


def make_app(open_service: Callable[[], Service]) -> FastAPI:
    """The application. `open_service` is called when it starts; all ends when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = app.state.service = open_service()
        service.jobs.begin()
        try:
            async with service.relay.open(partial(_live_of, service)) if service.relay else nullcontext():
                yield
                await service.drain()
        finally:
            service.close()

    app = FastAPI(
        title="forcingkv",
        version=forcingkv.__version__,
        summary="Videos of autoregressive diffusion models, as live sessions and as jobs.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.add_exception_handler(RefusalError, refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_there)
    for kind in (InputError, SessionError, sqlite3.Error, OSError):
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Guard)
    app.include_router(plain)
    app.include_router(router)
    app.add_api_websocket_route("/v1/live", _live)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


async def _live(websocket: WebSocket) -> None:
    await converse(websocket, service_of(websocket))


async def _live_of(service: Service, websocket: WebSocket) -> None:
    """A socket that another replica passes on: it has checked the page."""
    await converse(websocket, service, checked=True)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    return refused(request, RefusalError("bad_request", f"{place}: {fault['msg']}"))


def _not_there(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself, in the same shape."""
    assert isinstance(error, HTTPException)
    code: Code = "not_found" if error.status_code == 404 else "bad_request"
    answer = refused(request, RefusalError(code, f"{error.detail}."))
    answer.status_code = error.status_code
    return answer


def _failed(request: Request, error: Exception) -> JSONResponse:
    """What the client is told no more of than it may know. The log has what is not its fault."""
    refusal = refusal_of(error)
    if not refusal.is_the_clients:
        log.error("request failed", exc_info=error)
    return refused(request, refusal)


class Guard:
    """Of every request: no body too large, no foreign page, and headers that keep the page to itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        service = service_of(request)
        limits = service.settings.limits
        most, came, whole = limits.body, 0, False
        until = asyncio.get_running_loop().time() + limits.reader

        async def guarded() -> Message:
            nonlocal came, whole
            try:
                async with asyncio.timeout_at(None if whole else until):
                    message = await receive()
            except TimeoutError:
                what = f"The body did not come within {limits.reader:g} s."
                raise RefusalError("bad_request", what) from None
            whole = not message.get("more_body", False)
            came += len(message.get("body", b""))
            if came > most:
                raise RefusalError("too_large", f"A body has at most {most} bytes.")
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = {name.lower().encode(): text.encode() for name, text in HEADERS.items()}
                there = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name, text) for name, text in named.items() if name not in there),
                ]
            await send(message)

        try:
            check_client(service.settings, request)
            if int(Headers(scope=scope).get("content-length", "0") or 0) > most:
                raise RefusalError("too_large", f"A body has at most {most} bytes.")
        except (RefusalError, ValueError) as error:
            refusal = (
                error if isinstance(error, RefusalError) else RefusalError("bad_request", "Content-Length?")
            )
            await refused(request, refusal)(scope, receive, answer)
            return
        await self._app(scope, guarded, answer)
