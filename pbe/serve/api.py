"""The HTTP server for programs: OpenAI's endpoint for edits of images, one with all settings, and jobs."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

try:
    import python_multipart  # noqa: F401  # with which forms are read
    from fastapi import FastAPI, Request
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError as error:
    raise ImportError("the server needs the extra serve: pip install -e .[serve]") from error
from PIL import Image
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Scope

from pbe import __version__
from pbe.batch.job import COLUMNS, FILES, NUMBERS, REGION_COLUMNS, Job
from pbe.batch.provenance import Weights
from pbe.editing.settings import QUICK, SETTINGS, EditSettings
from pbe.io.atomic import remove
from pbe.io.fields import read
from pbe.models.paint_by_example import PaintByExample
from pbe.serve.engine import Cancelled, Closed, Engine, Full, Ticket
from pbe.serve.forms import SEVERAL, Uploads, edit_fields, openai_fields, stored, white_from_transparent
from pbe.serve.guard import Guard
from pbe.serve.jobs import OVER, Jobs, Record
from pbe.serve.limits import Limits
from pbe.serve.problems import Problem
from pbe.serve.schemas import ERROR, HEALTH, JOB, RESULTS, TEXT, body, form_schema, json_body, page
from pbe.serve.uploads import NUMBER, ticket_of

OPEN = ("/healthz", "/openapi.json", "/docs")  # without a token
MASKS = ("mask", *(f"mask_{n}" for n in NUMBERS))
MEGABYTE = 2**20


class Gate(Guard):
    """The guard of this server: with a token it asks for that, without one for the server's own host and origin."""

    def __init__(self, *args: Any, token: str | None, **named: Any):
        super().__init__(*args, **named)
        self.token = token

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        if self.token is None:
            return super().refusal(scope)
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").encode()
        if scope["path"] not in OPEN and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            return 401, "the token is missing or wrong: send Authorization: Bearer TOKEN"
        return self.oversize(headers)

    def failed(self, error: Exception) -> tuple[int, str]:
        logging.getLogger(__name__).error("a request failed", exc_info=error)
        return 500, "internal error"

    def refused(self, status: int, message: str) -> JSONResponse:
        return answer(Problem(status, message))


def answer(problem: Problem) -> JSONResponse:
    return JSONResponse({"error": problem.error}, problem.status_code, problem.headers)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    return answer(Problem.of(error))


class Metrics:
    """What Prometheus is told."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.edits = Counter("pbe_edits", "Edits that are over, by how they ended", ["status"], registry=self.registry)
        self.seconds = Histogram("pbe_edit_seconds", "Seconds that edits took, without waiting", registry=self.registry)
        self.together = Histogram("pbe_batch_edits", "Edits run together", buckets=(1, 2, 4, 8), registry=self.registry)
        waiting = Gauge("pbe_edits_waiting", "Edits in the queue", registry=self.registry)
        waiting.set_function(lambda: len(engine.waiting))
        running = Gauge("pbe_edits_running", "Edits that are made", registry=self.registry)
        running.set_function(lambda: len(engine.running))

    def note(self, record: Record, ticket: Ticket) -> None:
        self.edits.labels(record.status).inc()
        if ticket.started is not None:
            self.seconds.observe(time.monotonic() - ticket.started)
            self.together.observe(ticket.together)


@dataclass
class Api:
    """The endpoints for one model; the settings are those that a request leaves open."""

    model: PaintByExample
    weights: Weights
    settings: EditSettings
    files: Path
    limits: Limits
    engine: Engine = field(init=False)
    jobs: Jobs = field(init=False)
    metrics: Metrics = field(init=False)

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """The life of the server: its jobs are those of the last one, at first."""
        limits = self.limits
        self.engine = Engine(limits.max_waiting, limits.max_batch, limits.max_seconds)
        self.metrics = Metrics(self.engine)
        make = partial(ticket_of, self.model, self.weights)
        self.jobs = Jobs(self.engine, make, self.files, limits.max_files * MEGABYTE, self.metrics.note)
        yield
        await asyncio.to_thread(self.engine.close, limits.grace)

    def accept(self, uploads: Uploads, texts: dict[str, str], lasting: bool, openai: bool = False) -> Record:
        """Stores a request's files, and queues its edit. Problem for what is wrong, or where there is no room."""
        folder = self.jobs.new_folder()
        try:
            number = read("n" if openai else "num_images", texts.get("num_images", 1), NUMBER)
            row: dict[str, Any] = {name: texts[name] for name in (*FILES, *REGION_COLUMNS) if name in texts}
            for name, files in uploads.items():
                names = [stored(file, folder, f"{name}-{i}" if i else name) for i, file in enumerate(files)]
                row[name] = names if name in SEVERAL else names[0]
            for mask in (row[name] for name in row if openai and name in MASKS):
                white_from_transparent(folder / mask)
            given = {name: texts[name] for name in SETTINGS if name in texts}
            settings = EditSettings.from_texts(given, self.model.config.distilled, self.settings)
            job = Job.from_row({**row, **settings.to_json(), "out": f"result-{settings.seed}.png"}, folder)
            return self.jobs.add(Record(folder.name, job, number, lasting))
        except Exception as error:
            remove(folder)
            raise Problem.of(error, folder, (*COLUMNS, "num_images", "n")) from error

    async def accept_form(self, request: Request, lasting: bool, openai: bool) -> Record:
        self.engine.check_room()  # before anything is read
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Problem(415, "send multipart/form-data")
        async with request.form(max_files=100, max_fields=200) as form:
            fields = openai_fields(form) if openai else edit_fields(form)
            return await asyncio.to_thread(self.accept, *fields, lasting, openai)

    async def results(self, request: Request, record: Record) -> list[tuple[int, bytes]]:
        """The seeds and PNG files of a job that ends with this request, or once nobody waits for it."""
        try:
            while not await record.wait(1):
                if await request.is_disconnected():
                    raise Cancelled
            if record.problem:
                raise record.problem
            return [(record.job.settings.seed + i, path.read_bytes()) for i, path in enumerate(record.paths)]
        finally:
            self.jobs.delete(record.id)

    def find(self, id: str) -> Record:
        if id not in self.jobs.records:
            raise Problem(404, f"there is no job {id!r:.100}")
        return self.jobs.records[id]

    # --- the endpoints: their docstrings are what /docs says ----------------------------------------------

    async def edit_image(self, request: Request) -> Response:
        """OpenAI's endpoint for edits of images. `image[]` is given twice: the photo, and the exemplar, the picture of
        what is painted; of further ones the mean is used. The mask's transparent part is repainted or, if it has none,
        its white part. An edit's settings may be given beside OpenAI's fields."""
        return data(await self.results(request, await self.accept_form(request, lasting=False, openai=True)))

    async def edit(self, request: Request) -> Response:
        """An edit with all settings, of one region or of up to nine: `mask_2`, `exemplar_2` and the like are those of
        the second. The answer has the results; with the header `Accept: image/png` it is the picture,
        of one result. With `Prefer: respond-async` it is 202 and a job, which `Location` names."""
        lasting = "respond-async" in request.headers.get("prefer", "")
        record = await self.accept_form(request, lasting, openai=False)
        if lasting:
            return JSONResponse(record.to_json(), 202, {"Location": f"/v1/jobs/{record.id}"})
        results = await self.results(request, record)
        if "image/png" in request.headers.get("accept", "") and len(results) == 1:
            return Response(results[0][1], media_type="image/png")
        return data(results)

    async def job(self, id: str) -> Response:
        """How far a job is. Its status is queued, running, done, failed or cancelled."""
        return JSONResponse(self.find(id).to_json())

    async def delete(self, id: str) -> Response:
        """Ends a job at its next step, and deletes its files."""
        self.find(id)
        self.jobs.delete(id)
        return Response(status_code=204)

    async def result(self, id: str, number: int) -> Response:
        """A result of a job that is done, as PNG, which holds its settings; the first has the number 0."""
        record = self.find(id)
        if number >= len(record.paths):
            raise Problem(404, f"the job has no result {number}: it is {record.status}")
        return FileResponse(record.paths[number], media_type="image/png")

    async def events(self, id: str) -> Response:
        """A job's progress as server-sent events, until it is over. An event's name is the job's status; its data are
        the job's, with `preview` where there is a new one: a list of PNG files in base64, one per result."""
        record = self.find(id)

        async def events() -> AsyncIterator[str]:
            shown: list[Any] = []
            is_over = False
            while not (is_over or self.engine.closed):
                is_over, ticket = record.status in OVER, record.ticket
                state = record.to_json()
                if ticket and ticket.preview and ticket.preview is not shown:
                    shown = ticket.preview
                    state["preview"] = [encoded(picture) for picture in shown]
                yield f"event: {record.status}\ndata: {json.dumps(state)}\n\n"
                await record.wait(15)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def health(self) -> Response:
        """Whether the server is there, and which model it has."""
        status = "stopping" if self.engine.closed else "ok"
        return JSONResponse({"status": status, "version": __version__, "checkpoint": self.weights.checkpoint})

    async def prometheus(self) -> Response:
        """Prometheus' metrics."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def data(results: list[tuple[int, bytes]]) -> JSONResponse:
    """OpenAI's answer, with the seeds."""
    pictures = [{"seed": seed, "b64_json": base64.b64encode(png).decode()} for seed, png in results]
    return JSONResponse({"created": int(time.time()), "data": pictures})


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def build_api(
    model: PaintByExample,
    weights: Weights,
    files: Path,
    settings: EditSettings = QUICK,
    limits: Limits | None = None,
    token: str | None = None,
    host: str = "127.0.0.1",
    allow_hosts: tuple[str, ...] = (),
) -> FastAPI:
    """The server of one model; `weights` says in the results which it was.

    files: a folder for jobs, in which no other server has its own.
    settings: what a request leaves open.
    token: what clients must give; without one, `host` and `allow_hosts` are the names by which it may be called.
    """
    limits = limits or Limits()
    api = Api(model, weights, settings, files, limits)
    gate = Middleware(Gate, limits.max_body * MEGABYTE, host, allow_hosts, token=token)
    error = json_body(ERROR)
    app = FastAPI(
        title="pbe: Paint by Example",
        version=__version__,
        lifespan=api.running,
        middleware=[gate],
        docs_url=None,  # whose scripts come from elsewhere
        redoc_url=None,
        responses={"4XX": error, "5XX": error},
    )
    app.state.api = api
    for kind in (HTTPException, Full, Closed, Cancelled):
        app.add_exception_handler(kind, answer_error)
    job, results, png = json_body(JOB), json_body(RESULTS), body("image/png", TEXT)
    either = body("image/png", TEXT, **results["content"])
    routes: list[tuple[str, str, Callable[..., Any], dict[int | str, dict[str, Any]], dict[str, Any] | None]] = [
        ("POST", "/v1/images/edits", api.edit_image, {200: results}, form_schema(openai=True)),
        ("POST", "/v1/edits", api.edit, {200: either, 202: job}, form_schema()),
        ("GET", "/v1/jobs/{id}", api.job, {200: job}, None),
        ("DELETE", "/v1/jobs/{id}", api.delete, {204: {"description": "It is deleted."}}, None),
        ("GET", "/v1/jobs/{id}/events", api.events, {200: body("text/event-stream", TEXT)}, None),
        ("GET", "/v1/jobs/{id}/results/{number:int}", api.result, {200: png}, None),
        ("GET", "/healthz", api.health, {200: json_body(HEALTH)}, None),
        ("GET", "/metrics", api.prometheus, {200: body("text/plain", TEXT)}, None),
    ]
    for method, path, endpoint, responses, form in routes:
        status = min(code for code in responses if isinstance(code, int))
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            status_code=status,
            responses=responses,
            openapi_extra=form,
            response_class=Response,
        )
    app.add_api_route("/docs", lambda: HTMLResponse(page(app.openapi())), include_in_schema=False)
    return app
