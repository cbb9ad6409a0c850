"""The HTTP side: routes, limits and errors around any `ModelClient`. FastAPI, neither torch nor Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.api_errors import ApiError, ErrorBody, overloaded, unavailable
from serving.body import BoundedBody
from serving.config import ServeConfig
from serving.requests import (
    CaptionRequest,
    CaptionResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    Health,
    Inputs,
    ModelCard,
    ModelList,
    RequestLimits,
    caption_inputs_of_form,
    caption_inputs_of_json,
    caption_response,
    embedding_inputs,
    embeddings_response,
    invalid_request,
)
from serving.results import Caption, Embedding, ModelInfo, Refusal

Result = TypeVar("Result", Caption, Embedding)

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "An input is refused; the message says which and why"},
    404: {"model": ErrorBody, "description": "No model of that name"},
    413: {"model": ErrorBody, "description": "The body or an image is too large"},
    429: {"model": ErrorBody, "description": "Overloaded: Retry-After says when to come again"},
    503: {"model": ErrorBody, "description": "The model does not answer"},
    504: {"model": ErrorBody, "description": "The answer took too long"},
}
_CAPTION_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    "model": {"type": "string"},
                },
            }
        },
        "application/json": {"schema": CaptionRequest.model_json_schema()},
    },
}


class ModelClient(Protocol):
    """Whoever computes. Raises `ApiError` where the model cannot be reached."""

    async def caption(self, images: list[bytes]) -> list[Caption | Refusal]:
        """A caption or a refusal for each encoded image."""

    async def embed(self, inputs: list[str | bytes]) -> list[Embedding | Refusal]:
        """An embedding or a refusal for each text (`str`) or encoded image (`bytes`)."""

    async def check(self) -> None:
        """Return once a small forward pass succeeded."""


class Admission:
    """Bounds the inputs that are accepted and not yet answered, and the time an answer may take."""

    def __init__(self, max_pending: int, timeout_s: float) -> None:
        self._max_pending, self._timeout_s = max_pending, timeout_s
        self._pending = 0

    @asynccontextmanager
    async def admit(self, inputs: int) -> AsyncIterator[None]:
        with self._counted(inputs):
            try:
                async with asyncio.timeout(self._timeout_s):
                    yield
            except TimeoutError:
                raise ApiError(504, "timeout", f"no answer within {self._timeout_s:g} s") from None

    @contextmanager
    def _counted(self, inputs: int) -> Iterator[None]:
        if self._pending + inputs > self._max_pending:
            raise overloaded(self._pending, self._max_pending)
        self._pending += inputs
        try:
            yield
        finally:
            self._pending -= inputs


class HealthProbe:
    """Asks the model at a bounded rate: one check at a time, none within ``interval_s`` of the last."""

    def __init__(self, model: ModelClient, interval_s: float, timeout_s: float) -> None:
        self._model, self._interval_s, self._timeout_s = model, interval_s, timeout_s
        self._lock = asyncio.Lock()
        self._checked_at = float("-inf")
        self._failure: ApiError | None = None

    async def require(self) -> None:
        """Raise the last finding if it was a failure."""
        async with self._lock:
            if time.monotonic() - self._checked_at >= self._interval_s:
                self._failure = await self._check()
                self._checked_at = time.monotonic()
        if self._failure is not None:
            raise self._failure

    async def _check(self) -> ApiError | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._model.check()
        except TimeoutError:
            return unavailable(f"the model did not answer a health check within {self._timeout_s:g} s")
        except ApiError as error:
            return error
        return None


def create_api(config: ServeConfig, info: ModelInfo, model: ModelClient) -> FastAPI:
    """The ASGI application; every answer that is not 2xx has a body in OpenAI's form."""
    api = FastAPI(
        title="coca",
        version=info.version,
        description="Captions of images, and embeddings of images and texts in one space.",
    )
    limits = RequestLimits(max_inputs=config.max_inputs_per_request, max_image_bytes=config.max_image_bytes)
    admission = Admission(config.max_pending_inputs, config.request_timeout_s)
    probe = HealthProbe(model, config.health_interval_s, config.health_timeout_s)

    @api.post("/v1/caption", responses=_ERRORS, openapi_extra={"requestBody": _CAPTION_BODY})
    async def caption(request: Request, response: Response) -> CaptionResponse:
        """Caption images, uploaded as files or sent as base64."""
        images = await _caption_inputs(request, limits)
        _check_model(images.model, config)
        async with admission.admit(len(images.items)):
            captions = _all_answered(await model.caption(images.items), images.names)
        _describe(response, info, captions)
        return caption_response(captions, config.model_name)

    @api.post("/v1/embeddings", responses=_ERRORS)
    async def embeddings(request: EmbeddingsRequest, response: Response) -> EmbeddingsResponse:
        """Embed texts and images, as OpenAI's embeddings endpoint does."""
        _check_model(request.model, config)
        _check_dimensions(request.dimensions, info)
        inputs = embedding_inputs(request, limits)
        async with admission.admit(len(inputs.items)):
            results = _all_answered(await model.embed(inputs.items), inputs.names)
        _describe(response, info, results)
        return embeddings_response(results, config.model_name, request.encoding_format)

    @api.get("/v1/models")
    async def models() -> ModelList:
        """The one model served here."""
        card = ModelCard(id=config.model_name, version=info.version, embedding_dim=info.embedding_dim)
        return ModelList(data=[card])

    @api.get("/healthz", responses={503: _ERRORS[503]})
    async def healthz() -> Health:
        """200 only if the model itself answers a forward pass."""
        await probe.require()
        return Health(model=config.model_name, version=info.version)

    _answer_errors(api)
    _describe_errors(api)
    api.add_middleware(BoundedBody, max_bytes=config.max_body_bytes)
    return api


async def _caption_inputs(request: Request, limits: RequestLimits) -> Inputs[bytes]:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        return caption_inputs_of_json(await request.body(), limits)
    if media_type == "multipart/form-data":
        async with request.form(max_files=limits.max_inputs + 1, max_fields=8) as form:
            return await caption_inputs_of_form(form, limits)
    message = f"content type {media_type[:40]!r}: send multipart/form-data (-F image=@PATH) or application/json"
    raise ApiError(415, "unsupported_media_type", message)


def _check_model(name: str | None, config: ServeConfig) -> None:
    if name is not None and name != config.model_name:
        message = f"the model {name[:60]!r} does not exist; this service has {config.model_name!r}"
        raise ApiError(404, "model_not_found", message, param="model")


def _check_dimensions(dimensions: int | None, info: ModelInfo) -> None:
    if dimensions not in (None, info.embedding_dim):
        message = f"dimensions = {dimensions}: this model's embeddings have {info.embedding_dim}; leave it out"
        raise ApiError(400, "unsupported_dimensions", message, param="dimensions")


def _all_answered(results: Sequence[Result | Refusal], names: list[str]) -> list[Result]:
    """The results, if every input has one; else a 400 that names each input refused."""
    refused = [(n, result) for n, result in zip(names, results, strict=True) if isinstance(result, Refusal)]
    if refused:
        message = "; ".join(f"{name}: {refusal.detail}" for name, refusal in refused)
        first, refusal = refused[0]
        raise ApiError(400, refusal.reason, message, param=first)
    return [result for result in results if not isinstance(result, Refusal)]


def _describe(response: Response, info: ModelInfo, results: Sequence[Result]) -> None:
    response.headers["x-model-version"] = info.version
    response.headers["x-batch-size"] = str(max(result.batch_size for result in results))


def _answer_errors(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body().model_dump(), error.status, headers=error.headers())

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await told(request, invalid_request(error.errors()))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        # Starlette's own: no such route, wrong method, a form that cannot be read.
        code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return await told(request, ApiError(error.status_code, code, str(error.detail)))

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again for the log; the caller learns nothing of our insides.
        return await told(request, ApiError(500, "internal_error", "the service failed; its log has the cause"))


def _describe_errors(api: FastAPI) -> None:
    """OpenAPI without FastAPI's 422: what is invalid gets 400 here."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
