"""Configuration of the service."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from coca.typed_config import Config

Positive = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0)]


class ServeConfig(Config):
    """One model behind HTTP: what is served, where, and what a request may cost."""

    checkpoint: Annotated[str, Field(min_length=1)]
    """Checkpoint folder, or a run folder for its newest; a path or s3://, readable from every node."""
    model_name: Annotated[str, Field(min_length=1)] = "coca"
    """The name requests may give as `model`; any other is answered with 404."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the port to the network, where nothing here asks for a key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""

    replicas: Positive = 1
    """Copies of the model, each with resources of its own."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1.0
    """CPUs each replica reserves; on CPU the model computes with as many threads."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs each replica reserves; above 0 the model runs on the GPU. Fractions let replicas share one."""
    decode_threads: Positive = 2
    """Threads of each replica that decode images."""

    max_batch_size: Positive = 16
    """Most images or texts computed in one pass."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 10.0
    """How long a batch that is not full waits for more."""
    max_pending_inputs: Positive = 256
    """Images and texts accepted and not yet answered; beyond, requests get 429 with Retry-After."""
    request_timeout_s: PositiveSeconds = 30.0
    """Time from a request's whole arrival to its answer; beyond, 504."""

    max_body_bytes: Positive = 32 * 1024 * 1024
    """Largest request body; beyond, 413 without reading on."""
    max_inputs_per_request: Positive = 32
    """Most images or texts in one request."""
    max_image_bytes: Positive = 10 * 1024 * 1024
    """Largest encoded image; beyond, 413."""
    max_pixels: Annotated[int, Field(gt=0, le=89_478_485)] = 25_000_000
    """Largest width times height of an image, read from its header before anything is decoded."""
    max_caption_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest caption in tokens, begin and end included; null for the model's context length."""

    health_interval_s: PositiveSeconds = 5.0
    """How long `/healthz` may repeat its last finding instead of asking the model again."""
    health_timeout_s: PositiveSeconds = 30.0
    """A model that takes longer to answer a health check counts as failing; its replica is replaced."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_inputs_per_request > self.max_pending_inputs:
            raise ValueError(
                f"max_inputs_per_request = {self.max_inputs_per_request} is above max_pending_inputs = "
                f"{self.max_pending_inputs}: such a request would never be admitted"
            )
        if self.max_image_bytes > self.max_body_bytes:
            raise ValueError(
                f"max_image_bytes = {self.max_image_bytes} is above max_body_bytes = {self.max_body_bytes}: "
                "such an image would never arrive"
            )
        return self
