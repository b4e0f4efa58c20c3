"""Errors of the HTTP API, in the shape of OpenAI's."""

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An HTTP error response.

    Args:
        status: HTTP status.
        message: The problem, with the value, the limit and the remedy.
        param: The request field at fault, if any.
        code: Machine-readable error code.
        retry_after: Seconds for the Retry-After header; None omits it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return the response body: https://platform.openai.com/docs/guides/error-codes."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers specific to this error."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def draining() -> ApiError:
    """Return the error for requests during shutdown."""
    return ApiError(503, "the server is shutting down; try another one", code="shutting_down", retry_after=1)
