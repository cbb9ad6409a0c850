"""Requests and responses: OpenAI's embeddings shape, captions by upload or base64. No URL is fetched."""

import base64
import binascii
import re
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from starlette.datastructures import FormData, UploadFile

from serving.api_errors import ApiError
from serving.results import Caption, Embedding

Item = TypeVar("Item")

_URL = re.compile(r"^\s*[a-z][a-z0-9+.-]*://\S+\s*$", re.IGNORECASE)
_DATA_URI = re.compile(r"^data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class TextInput(_Body):
    """A text, said to be one: for texts that look like a URL or a data URI."""

    text: str
    """The text."""


class ImageInput(_Body):
    """An image."""

    image: str
    """A data URI (`data:image/png;base64,...`) or plain base64. URLs are not fetched."""


class EmbeddingsRequest(_Body):
    """OpenAI's embeddings request, with images beside texts."""

    input: str | TextInput | ImageInput | list[str | TextInput | ImageInput]
    """One input or a list, texts and images mixed. A plain string that is a `data:image/...` URI is an image,
    any other a text."""
    model: str | None = None
    """Name of the served model; may be left out."""
    encoding_format: Literal["float", "base64"] = "float"
    """Lists of numbers, or base64 of little-endian float32."""
    dimensions: int | None = None
    """Where given, it must be the model's own dimension: embeddings are not shortened."""

    @field_validator("input", mode="wrap")
    @classmethod
    def _told_in_one_line(cls, value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(
                'an input is a string, {"text": ...} or {"image": ...}, or a list of these; never token ids'
            ) from None


class CaptionRequest(_Body):
    """Images to caption, as base64 or data URIs."""

    image: str | None = None
    """One image: a data URI or plain base64."""
    images: list[str] | None = None
    """Several images."""
    model: str | None = None
    """Name of the served model; may be left out."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.image is None) == (self.images is None):
            raise ValueError("give either `image` (one) or `images` (a list)")
        return self


class EmbeddingItem(BaseModel):
    """The embedding of the input at `index`: unit length, numbers or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts, begin and end included; images count none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """One embedding for each input, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class CaptionItem(BaseModel):
    """The caption of the image at `index`; `finish_reason` is `length` where it was cut."""

    index: int
    caption: str
    finish_reason: Literal["stop", "length"]


class CaptionResponse(BaseModel):
    """One caption for each image, in the order of the images."""

    data: list[CaptionItem]
    model: str


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    version: str
    embedding_dim: int


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The model answered a forward pass no longer ago than the health interval."""

    status: Literal["ok"] = "ok"
    model: str
    version: str


class RequestLimits(NamedTuple):
    """What one request may hold."""

    max_inputs: int
    max_image_bytes: int


class Inputs(NamedTuple, Generic[Item]):
    """What a request asks about, in order."""

    items: list[Item]
    names: list[str]
    """What each item is called in the request, for errors: `input[3]`."""
    model: str | None
    """The model asked for."""


def embedding_inputs(request: EmbeddingsRequest, limits: RequestLimits) -> Inputs[str | bytes]:
    """`str` for texts, `bytes` for encoded images."""
    if isinstance(request.input, list):
        given, names = request.input, _names("input", len(request.input))
    else:
        given, names = [request.input], ["input"]
    _check_count(len(given), "input", limits)
    items = [_embedding_input(item, name, limits) for item, name in zip(given, names, strict=True)]
    return Inputs(items, names, request.model)


def caption_inputs_of_json(body: bytes, limits: RequestLimits) -> Inputs[bytes]:
    """Encoded images of a JSON body."""
    try:
        request = CaptionRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_input=False, include_url=False)) from None
    if request.images is None:
        given, names = [request.image or ""], ["image"]
    else:
        given, names = request.images, _names("images", len(request.images))
    _check_count(len(given), "images", limits)
    images = [decode_image(text, name, limits) for text, name in zip(given, names, strict=True)]
    return Inputs(images, names, request.model)


async def caption_inputs_of_form(form: FormData, limits: RequestLimits) -> Inputs[bytes]:
    """Encoded images of a multipart form: files under `image`, optionally `model`."""
    images: list[bytes] = []
    model = None
    for name, value in form.multi_items():
        if name == "image" and isinstance(value, UploadFile):
            images.append(await value.read())
        elif name == "image":
            raise ApiError(400, "not_a_file", "`image` holds text, not a file: curl -F image=@PATH", param="image")
        elif name == "model" and isinstance(value, str):
            model = value
        else:
            raise ApiError(400, "unknown_field", f"unknown form field {name[:40]!r}; known: image, model")
    _check_count(len(images), "image", limits)
    names = _names("image", len(images))
    for image, name in zip(images, names, strict=True):
        _check_image_bytes(len(image), name, limits)
    return Inputs(images, names, model)


def decode_image(text: str, param: str, limits: RequestLimits) -> bytes:
    """Encoded image bytes from a data URI or plain base64."""
    if _URL.match(text):
        message = "URLs are not fetched: send the image's bytes as a data URI (data:image/png;base64,...)"
        raise ApiError(400, "url_not_fetched", message, param=param)
    encoded = _payload(text, param) if text[:5].lower() == "data:" else text
    _check_image_bytes(len(encoded) * 3 // 4 - 2, param, limits)
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_base64", "the image is not valid base64", param=param) from None
    _check_image_bytes(len(data), param, limits)
    return data


def caption_response(captions: list[Caption], model: str) -> CaptionResponse:
    items = [
        CaptionItem(index=index, caption=caption.text, finish_reason="stop" if caption.complete else "length")
        for index, caption in enumerate(captions)
    ]
    return CaptionResponse(data=items, model=model)


def embeddings_response(
    embeddings: list[Embedding], model: str, encoding_format: Literal["float", "base64"]
) -> EmbeddingsResponse:
    items = [
        EmbeddingItem(index=index, embedding=_encode_vector(embedding.vector, encoding_format))
        for index, embedding in enumerate(embeddings)
    ]
    tokens = sum(embedding.tokens for embedding in embeddings)
    return EmbeddingsResponse(data=items, model=model, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))


def invalid_request(problems: Any) -> ApiError:
    """The first of pydantic's problems, without the input: payloads are never echoed or logged."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "the body is not JSON")
    param = ".".join(str(part) for part in problem["loc"] if part != "body") or None
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, "invalid_request", f"{param}: {message}" if param else message, param=param)


def _names(field: str, count: int) -> list[str]:
    return [f"{field}[{index}]" for index in range(count)]


def _embedding_input(item: str | TextInput | ImageInput, param: str, limits: RequestLimits) -> str | bytes:
    if isinstance(item, ImageInput):
        return decode_image(item.image, param, limits)
    if isinstance(item, TextInput):
        return _sound_text(item.text, param)
    if item[:11].lower() == "data:image/":
        return decode_image(item, param, limits)
    if _URL.match(item):
        message = 'URLs are not fetched: send an image as a data URI; {"text": ...} embeds the URL itself'
        raise ApiError(400, "url_not_fetched", message, param=param)
    return _sound_text(item, param)


def _sound_text(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "invalid_text", "the text is not Unicode: half a surrogate pair", param=param) from None
    return text


def _payload(text: str, param: str) -> str:
    header = _DATA_URI.match(text[:200])
    if header is None or ";base64" not in header[2].lower() or not header[1].lower().startswith("image/"):
        message = "a data URI must look like data:image/png;base64,..."
        raise ApiError(400, "invalid_data_uri", message, param=param)
    return text[header.end() :]


def _check_count(count: int, param: str, limits: RequestLimits) -> None:
    if count == 0:
        raise ApiError(400, "empty_input", f"`{param}` is empty: send at least one", param=param)
    if count > limits.max_inputs:
        message = f"{count} inputs, at most {limits.max_inputs} in one request: split it"
        raise ApiError(400, "too_many_inputs", message, param=param)


def _check_image_bytes(size: int, param: str, limits: RequestLimits) -> None:
    if size > limits.max_image_bytes:
        message = f"the image has {size:,} bytes, at most {limits.max_image_bytes:,}: send a smaller one"
        raise ApiError(413, "image_too_large", message, param=param)


def _encode_vector(vector_E: np.ndarray, encoding_format: Literal["float", "base64"]) -> list[float] | str:
    if encoding_format == "float":
        return vector_E.tolist()
    return base64.b64encode(vector_E.astype("<f4").tobytes()).decode()
