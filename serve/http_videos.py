"""Jobs over HTTP, in the shape that OpenAI's video API made common: its clients work here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forcingkv.serve.access import check_token, client_of
from forcingkv.serve.job_store import Job, Status
from forcingkv.serve.messages import in_words
from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.service import Service, service_of

DEFAULT_SECONDS = 4.0


class VideoRequest(BaseModel):
    """What a client asks for. Names that are not known are refused: what they ask for would be missing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    model: Annotated[str, Field(max_length=100)] | None = None
    """A bundle's name; none: the first of the service."""
    seconds: Annotated[float, Field(gt=0)] = DEFAULT_SECONDS
    """Rounded up to whole chunks."""
    size: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")] | None = None
    """Width x height: that of the bundle, or nothing."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Ours: the same seed gives the same video."""


class VideoError(BaseModel):
    """Why a video was not made."""

    code: str
    message: str


class Video(BaseModel):
    """A job."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None = None
    prompt: str
    seconds: str
    size: str
    seed: int
    error: VideoError | None
    remixed_from_video_id: str | None = None

    @classmethod
    def of(cls, job: Job) -> Video:
        """A job as clients see it."""
        error = (
            VideoError(code=job.code or "failed", message=job.message or "")
            if job.status == "failed"
            else None
        )
        return cls(
            id=job.id,
            model=job.bundle,
            status=job.status,
            progress=job.progress,
            created_at=job.created,
            completed_at=job.completed,
            prompt=job.prompt,
            seconds=job.seconds,
            size=job.size,
            seed=job.seed,
            error=error,
        )


class VideoList(BaseModel):
    """Jobs, one page of them."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


Used = Annotated[Service, Depends(service_of)]


def allowed(request: Request, service: Used) -> None:
    """Let in who has the token. Which page asks was looked at before (`app.Guard`)."""
    check_token(service.settings, request.headers)


router = APIRouter(prefix="/v1/videos", tags=["videos"], dependencies=[Depends(allowed)])


async def _asked(request: Request) -> VideoRequest:
    """The body, JSON or a form. Raises RefusalError that says which field is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: Any
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        form = await request.form(max_files=1, max_fields=20)
        fields = dict(form)
        reference = fields.pop("input_reference", None)
        if reference is not None:
            raise RefusalError(
                "bad_request", "input_reference is not taken: begin a live session with a picture."
            )
    elif kind == "application/json":
        body = await request.body()
        try:
            return VideoRequest.model_validate_json(body)
        except ValidationError as error:
            raise RefusalError("bad_request", in_words(error)) from error
    else:
        raise RefusalError("bad_request", "The body is JSON or a form (multipart/form-data).")
    try:
        return VideoRequest.model_validate(fields)
    except ValidationError as error:
        raise RefusalError("bad_request", in_words(error)) from error


@router.post("", response_model=Video)
async def create(request: Request, service: Used) -> Video:
    """Ask for a video. It is made when there is a place."""
    asked = await _asked(request)
    engine, limits = service.engine, service.settings.limits
    bundle = engine.bundle(asked.model)
    spec, size = bundle.bundle.plan.spec, "{}x{}".format(*bundle.bundle.manifest.frame_size)
    if asked.size not in (None, size):
        raise RefusalError("bad_request", f"The bundle {bundle.name!r} makes {size}, not {asked.size}.")
    if asked.seconds > limits.seconds:
        raise RefusalError("bad_request", f"A video has at most {limits.seconds:g} seconds.")
    await engine.prompt(bundle, asked.prompt)
    job = Job(
        id="",
        client=client_of(request),
        bundle=bundle.name,
        prompt=asked.prompt,
        seed=asked.seed,
        chunks=spec.chunks_for(asked.seconds),
        seconds=f"{asked.seconds:g}",
        size=size,
    )
    return Video.of(await service.jobs.add(job))


@router.get("", response_model=VideoList)
async def listed(
    service: Used,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """Jobs, the newest first."""
    jobs = await service.engine.aside(service.jobs.store.all)
    if order == "desc":
        jobs.reverse()
    if after is not None:
        names = [job.id for job in jobs]
        if after not in names:
            raise RefusalError("not_found", "There is no such video to list from.")
        jobs = jobs[names.index(after) + 1 :]
    shown = [Video.of(job) for job in jobs[:limit]]
    ends = (shown[0].id, shown[-1].id) if shown else (None, None)
    return VideoList(data=shown, first_id=ends[0], last_id=ends[1], has_more=len(jobs) > limit)


@router.get("/{name}", response_model=Video)
async def retrieve(name: str, service: Used) -> Video:
    """How far a job is."""
    return Video.of(await _found(service, name))


@router.head("/{name}/content", include_in_schema=False)
@router.get("/{name}/content", response_class=FileResponse)
async def content(name: str, service: Used, variant: str = "video") -> Response:
    """The video, whole or a range of its bytes."""
    if variant != "video":
        raise RefusalError("bad_request", "There is the variant video alone.")
    job = await _found(service, name)
    if job.status != "completed":
        raise RefusalError("not_now", f"The video is not there: it is {job.status}.")
    path = service.jobs.store.video(job.id)  # of the name in the table, not of the request's
    if not path.is_file():
        raise RefusalError("gone", "The video's file is gone.")
    return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")


@router.delete("/{name}", response_model=Deleted)
async def delete(name: str, service: Used) -> Deleted:
    """Remove a job and its video; one at work is stopped."""
    job = await _found(service, name)
    await service.jobs.remove(job.id)
    return Deleted(id=job.id)


async def _found(service: Service, name: str) -> Job:
    if re.fullmatch(r"video_[0-9a-f]{32}", name):
        try:
            return await service.engine.aside(service.jobs.store.get, name)
        except KeyError:
            pass
    raise RefusalError("not_found", "There is no such video.")


def refused(request: Request, error: Exception) -> JSONResponse:
    """A refusal as clients of that API expect it."""
    assert isinstance(error, RefusalError)
    service_of(request).engine.metrics.refusals.labels(error.code).inc()
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    body = {"error": {"code": error.code, "message": error.message, "type": kind, "param": None}}
    headers = {"Retry-After": str(max(1, round(error.retry_after)))} if error.retry_after is not None else {}
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, error.status, headers)
