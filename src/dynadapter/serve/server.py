"""HTTP for serving engines: an image is answered by its label, and an invalid request by a one-line error."""

import asyncio
import contextlib
import io
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import dynadapter
from dynadapter.files import one_line
from dynadapter.images.reading import FORMATS, UnreadableImage
from dynadapter.serve.bundle.config import Config
from dynadapter.serve.bundle.reading import read_config
from dynadapter.serve.engine import Engine
from dynadapter.serve.metrics import Metrics
from dynadapter.serve.requests import Closed, Full, Late, Limits, Served

LOG = logging.getLogger("dynadapter.serve")
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; img-src blob:; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the page may load: nothing from elsewhere."""
RETRY = {"Retry-After": "1"}
PARAMETERS = ("top_k", "threshold", "max_gmacs", "deadline_ms")
"""What a request may give in its path after ``?``."""
LEFT = 499
"""Status of a request whose client left; nobody sees it, and the metrics count it."""


@dataclass(frozen=True)
class Settings:
    """The limits of uploads.

    Args:
        max_bytes: Largest size of an image file.
        max_pixels: Largest number of pixels of an image.
        upload_seconds: Seconds in which a body must arrive.
        max_uploads: Largest total size in bytes of all bodies in memory.
    """

    max_bytes: int = 2**24
    max_pixels: int = 40_000_000
    upload_seconds: float = 10.0
    max_uploads: int = 2**28


class Problem(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class Upload:
    """The body of a request; an image with too many pixels is refused before it is decoded."""

    name = "of the request"

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self.data, self.max_pixels = data, max_pixels

    def fetch(self) -> bytes:
        """Return the bytes."""
        with Image.open(io.BytesIO(self.data), formats=FORMATS) as image:
            width, height = image.size
        if width * height > self.max_pixels:
            raise ValueError(f"{width} x {height} pixels are more than {self.max_pixels:,}; send a smaller image")
        return self.data


class Service:
    """The routes of a server.

    Args:
        engines: The engines by the names of their bundles in the path.
        settings: The limits of uploads.
        places: Folders of the bundles by name, to detect a replaced bundle; bundles without a folder are left out.

    Attributes:
        answered: Requests that were answered by a label.
        cut_off: Requests that were ended without an answer, because the server stopped before.
    """

    def __init__(
        self, engines: Mapping[str, Engine], settings: Settings, places: Mapping[str, Path] | None = None
    ) -> None:
        self.engines, self.settings, self.places = engines, settings, places or {}
        self.metrics = Metrics(engines)
        self.held = 0  # bytes of uploads
        self.answered = self.cut_off = 0

    def app(self) -> FastAPI:
        """Return the application; when it ends, it closes the engines."""

        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await asyncio.gather(*(asyncio.to_thread(engine.close) for engine in self.engines.values()))

        app = FastAPI(
            title="dynadapter", version=dynadapter.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
        )
        route = app.add_api_route
        route("/", self.page, response_class=HTMLResponse, include_in_schema=False)
        route("/health", self.health)
        route("/ready", self.ready, response_model=None)
        route("/metrics", self.measured, response_model=None)
        route("/v1", self.bundles)
        route("/v1/{name}", self.bundle)
        route("/v1/{name}/predict", self.predict, methods=["POST"], response_model=None, openapi_extra=BODY)
        app.add_exception_handler(Problem, _problem)
        app.add_exception_handler(HTTPException, _problem)
        app.add_exception_handler(RequestValidationError, self._wrong_value)
        app.add_exception_handler(Exception, _bug)
        return app

    # ---- routes

    async def page(self) -> HTMLResponse:
        """Return the page that accepts a photo by drag and drop."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    async def health(self) -> dict[str, str]:
        """Answer 200 while the process runs."""
        return {"status": "alive"}

    async def ready(self) -> Response:
        """Answer 200 while images are accepted, else 503."""
        waiting = [name for name, engine in self.engines.items() if not engine.ready()]
        if waiting:
            return JSONResponse({"error": f"not ready: {', '.join(waiting)}"}, 503)
        return JSONResponse({"status": "ready"})

    async def measured(self) -> Response:
        """Return the metrics in the format of Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def bundles(self) -> list[dict[str, Any]]:
        """Describe all bundles."""
        return [self._described(name) for name in self.engines]

    def bundle(self, name: str) -> dict[str, Any]:
        """Describe one bundle, with the names of its classes."""
        return self._described(name) | {"class_names": list(self._engine(name).bundle.class_names)}

    async def predict(
        self,
        request: Request,
        name: str,
        top_k: Annotated[int, Query(ge=1, description="classes to name")] = 1,
        threshold: Annotated[float | None, Query(ge=0, le=1, description="instead of the policy's own")] = None,
        max_gmacs: Annotated[float | None, Query(gt=0, description="stop at the last exit within this cost")] = None,
        deadline_ms: Annotated[float | None, Query(gt=0, description="stop at the last exit within this time")] = None,
    ) -> Response:
        """Classify the image in the body."""
        start, engine = time.perf_counter(), self._engine(name)
        status = 500
        try:
            _check_parameters(request)
            async with self._body(request, engine) as data:
                seconds = None if deadline_ms is None else deadline_ms / 1000 - (time.perf_counter() - start)
                source = Upload(data, self.settings.max_pixels)
                served = await self._served(request, engine, source, Limits(threshold, max_gmacs, seconds))
            content = answered(engine, served, top_k) | {"bundle": name}
            taken = time.perf_counter() - start
            self.metrics.seconds.labels(name).observe(taken)
            status, self.answered = 200, self.answered + 1
            return JSONResponse(content | {"milliseconds": round(1000 * taken, 1)})
        except ClientDisconnect:
            status = LEFT
            return Response(status_code=LEFT)
        except asyncio.CancelledError:  # the server stops and waits no longer
            self.cut_off += 1
            raise
        except Problem as problem:
            status = problem.status
            raise
        finally:
            self.metrics.requests.labels(name, str(status)).inc()

    # ---- parts

    async def _wrong_value(self, request: Request, error: Any) -> Response:
        """Answer a value that FastAPI refused before :meth:`predict` began, and count it as that would."""
        name, first = request.path_params.get("name"), error.errors()[0]
        if name in self.engines:
            self.metrics.requests.labels(name, "400").inc()
        message = f"{first['loc'][-1]}={str(first.get('input'))[:100]!r}: {first['msg']}"
        return JSONResponse({"error": message}, 400)

    def _engine(self, name: str) -> Engine:
        if name not in self.engines:
            raise Problem(404, f"there is no bundle {name[:100]!r}; there are {', '.join(self.engines)}")
        return self.engines[name]

    def _described(self, name: str) -> dict[str, Any]:
        bundle, costs = self._engine(name).bundle, self._engine(name).costs
        return {
            "name": name,
            "backbone": bundle.config.backbone.name,
            "classes": len(bundle.class_names),
            "policy": bundle.policy.name,
            "gmacs": list(costs.gmacs),
            "static_gmacs": costs.static / 1e9,
            "sha256": bundle.config.sha256,
            "on_disk": _on_disk(self.places.get(name), bundle.config),
        }

    @contextlib.asynccontextmanager
    async def _body(self, request: Request, engine: Engine) -> AsyncIterator[bytes]:
        """Read the body within the limits, and count its bytes while they are in use."""
        _check_head(request, self.settings.max_bytes)
        if engine.is_full():  # before anything is sent for nothing
            raise Problem(429, f"{engine.queue} images wait already; send this one again later", RETRY)
        data, size = bytearray(), 0
        try:
            await self._receive(request, data)
            body, size = bytes(data), len(data)
            data.clear()
            yield body
        finally:
            self.held -= size or len(data)

    async def _receive(self, request: Request, data: bytearray) -> None:
        seconds = self.settings.upload_seconds
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    data += chunk
                    self.held += len(chunk)
                    if len(data) > self.settings.max_bytes:
                        raise _too_large(self.settings.max_bytes)
                    if self.held > self.settings.max_uploads:
                        raise Problem(429, "too many uploads at a time; send this one again later", RETRY)
        except TimeoutError:
            message = f"the body did not arrive within {seconds:g} seconds; send it faster, or a smaller file"
            raise Problem(408, message, {"Connection": "close"}) from None
        if not data:
            raise Problem(400, "the body is empty; send the bytes of an image, as curl --data-binary @photo.jpg does")

    async def _served(self, request: Request, engine: Engine, source: Upload, limits: Limits) -> Served:
        """Wait for the answer of the engine, unless the client disconnects."""
        with _as_problem():
            if limits.deadline is not None and limits.deadline <= 0:
                raise Late("the deadline passed while the image was sent; give a longer one")
            try:
                job: Future[Served] = engine.submit(source, limits)
            except ValueError as error:  # of the budget
                raise Problem(400, str(error).replace("deadline=", "deadline_ms=")) from None
            answer: asyncio.Future[Any] = asyncio.wrap_future(job)
            disconnected: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
            try:
                await asyncio.wait({answer, disconnected}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise ClientDisconnect
                return answer.result()
            finally:
                disconnected.cancel()
                answer.cancel()


BODY = {"requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}


def answered(engine: Engine, served: Served, top_k: int) -> dict[str, Any]:
    """Return an answer as plain data; exits count from 1."""
    bundle = engine.bundle
    best = served.probabilities.argsort(descending=True, stable=True)[:top_k].tolist()
    top = [{"label": bundle.class_names[k], "probability": round(served.probabilities[k].item(), 6)} for k in best]
    return {
        "label": top[0]["label"],
        "confidence": top[0]["probability"],
        "top": top,
        "exit": served.exit_index + 1,
        "exits": engine.exits,
        "gmacs": engine.costs.gmacs[served.exit_index],
        "limited": served.limited,
    }


@contextlib.contextmanager
def _as_problem() -> Iterator[None]:
    try:
        yield
    except UnreadableImage as error:
        raise Problem(422, f"the body cannot be read as an image: {error.reason}") from None
    except Full as error:
        raise Problem(429, str(error), {"Retry-After": str(error.retry_after)}) from None
    except Closed as error:
        raise Problem(503, str(error), RETRY) from None
    except Late as error:
        raise Problem(504, str(error)) from None
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        LOG.error("an image could not be answered: %s", error)
        raise Problem(500, one_line(error)) from None


def _check_parameters(request: Request) -> None:
    if unknown := [name for name in request.query_params if name not in PARAMETERS]:
        raise Problem(400, f"{unknown[0][:100]!r} is not a parameter; give one of {', '.join(PARAMETERS)}")


def _check_head(request: Request, max_bytes: int) -> None:
    if request.headers.get("content-type", "").startswith("multipart/"):
        message = "the body is a form; send the bytes of the image alone, as curl --data-binary @photo.jpg does"
        raise Problem(415, message)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> Problem:
    return Problem(413, f"the body has more than {max_bytes:,} bytes; send a smaller file")


def _on_disk(place: Path | None, loaded: Config) -> str:
    """Compare the bundle on the disk with the loaded one; the loaded one is served until the next start."""
    if place is None:
        return "unknown"
    try:
        found = read_config(place)
    except OSError:
        return "removed"
    except ValueError:  # not a configuration of this version
        return "replaced"
    return "as loaded" if found.dumps() == loaded.dumps() else "replaced"


# ---- errors as JSON


async def _problem(_: Request, error: Any) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": str(error)}, error.status, error.headers)


async def _bug(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the server failed ({type(error).__name__}); its log has more"}, 500)
