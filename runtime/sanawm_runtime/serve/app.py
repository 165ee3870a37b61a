"""The ASGI application: the page, the WebSocket, health, metrics and a timeline."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

import sanawm
from sanawm_runtime.metrics import Metrics
from sanawm_runtime.serve.assets import Asset, page_files, sample_images, thumbnail
from sanawm_runtime.serve.connection import Connection, Gate
from sanawm_runtime.serve.guard import Guard, token_matches
from sanawm_runtime.serve.limits import Limits
from sanawm_runtime.serve.protocol import CLOSE_GOING_AWAY
from sanawm_runtime.serve.sessions import Sessions
from sanawm_runtime.world import World


def create_app(
    world: World,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    hosts: Sequence[str] | None = ("127.0.0.1", "localhost", "::1"),
    origins: Sequence[str] = (),
) -> Starlette:
    """A server's application around an opened world, which stays the caller's to close.

    token: what clients must present (None: nothing). hosts: names the server answers under (None: any; only sensible with a token).
    origins: further web origins whose pages may connect. `app.state.gate` has the connections and sessions.
    """
    limits = limits or Limits()
    samples = sample_images()
    files = page_files()
    thumbnails = {name: thumbnail(sample.image) for name, sample in samples.items()}
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sessions = Sessions(world, limits, metrics, samples)
        app.state.gate = Gate(sessions, limits, token)
        yield
        await say_goodbye(app)
        await sessions.close()

    async def page(request: Request) -> Response:
        return _served(files["index.html"], request)

    async def file(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        return _missing() if found is None else _served(found, request)

    async def sample(request: Request) -> Response:
        found = thumbnails.get(request.path_params["name"])
        return _missing() if found is None else _served(found, request)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "closed" if world.closed else "ok"}, 503 if world.closed else 200)

    async def status(request: Request) -> Response:
        if not token_matches(request.headers, token):
            return _unauthorized()
        gate: Gate = app.state.gate
        manifest = world.bundle.manifest
        return JSONResponse(
            {
                "server": sanawm.__version__,
                "world": {"name": manifest.name, "digest": world.bundle.digest, "engine": manifest.target.engine, "target": manifest.target.name},
                "connections": len(gate.open),
                "sessions": len(gate.sessions),
                "most_sessions": limits.sessions,
                "engine_waiting": world.turns.waiting,
            }
        )

    async def scrape(request: Request) -> Response:
        if not token_matches(request.headers, token):
            return _unauthorized()
        return Response(metrics.text(), headers={"content-type": metrics.content_type})

    async def timeline(request: Request) -> Response:
        if not token_matches(request.headers, token):
            return _unauthorized()
        chunks = list(app.state.gate.sessions.timings)
        if not chunks:
            return PlainTextResponse("No chunk has been sent yet.\n", 404)
        return Response(await asyncio.to_thread(_timeline_png, chunks, world.config.stream.fps), media_type="image/png")

    async def socket(websocket: WebSocket) -> None:
        await Connection(websocket, app.state.gate).run()

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/page/{name}", file),
            Route("/samples/{name}", sample),
            Route("/healthz", health),
            Route("/status", status),
            Route("/metrics", scrape),
            Route("/timeline.png", timeline),
            WebSocketRoute("/ws", socket),
        ],
        lifespan=lifespan,
    )
    app.add_middleware(Guard, hosts=hosts, origins=origins)
    return app


async def say_goodbye(app: Starlette) -> None:
    """Tell every client that the server stops."""
    open_now = list(app.state.gate.open)
    await asyncio.gather(*(connection.say_goodbye(CLOSE_GOING_AWAY, "the server is stopping") for connection in open_now))


def _served(found: Asset, request: Request) -> Response:
    headers = {"etag": found.etag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.data, headers={**headers, "content-type": found.media_type})


def _missing() -> Response:
    return PlainTextResponse("There is nothing here.\n", 404)


def _unauthorized() -> Response:
    return PlainTextResponse("A token is needed.\n", 401, {"www-authenticate": "Bearer"})


def _timeline_png(chunks: list[dict[str, object]], fps: int) -> bytes:
    from sanawm_runtime.pictures import timeline_plot

    out = io.BytesIO()
    timeline_plot({"fps": fps, "chunks": chunks}, title="The last chunks of all sessions").save(out, "PNG")
    return out.getvalue()
