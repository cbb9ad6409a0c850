"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    """The cause and the way out, for a person."""
    type: str
    """`invalid_request_error` for the caller's fault, `overloaded_error` and `server_error` for ours."""
    param: str | None
    """The field at fault, such as `input[3]`."""
    code: str
    """The cause as a word to switch on."""


class ErrorBody(BaseModel):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that ends without a result, with its status and cause."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, _utf8(message)
        self.param, self.retry_after_s = None if param is None else _utf8(param), retry_after_s

    def body(self) -> ErrorBody:
        return ErrorBody(error=ErrorDetail(message=self.message, type=self._type(), param=self.param, code=self.code))

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def _type(self) -> str:
        if self.status == 429:
            return "overloaded_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def _utf8(text: str) -> str:
    # JSON may carry half a surrogate pair, which no response can.
    return text.encode("utf-8", "backslashreplace").decode()


def overloaded(pending: int, limit: int) -> ApiError:
    message = f"{pending} inputs are pending, at most {limit}: try again in a moment"
    return ApiError(429, "overloaded", message, retry_after_s=1)


def unavailable(cause: str) -> ApiError:
    return ApiError(503, "model_unavailable", f"{cause}: try again in a moment", retry_after_s=5)
