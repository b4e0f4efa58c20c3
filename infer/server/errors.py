"""Errors of the HTTP API, in the shape of OpenAI's."""

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or fails.

    Args:
        status: HTTP status.
        message: What is wrong, with the value, the limit and the remedy.
        param: The field of the request at fault, if one is.
        code: A word for programs to tell errors apart.
        retry_after: Seconds after which to try again; None if that would not help.
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
        """The response body: https://platform.openai.com/docs/guides/error-codes."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Response headers besides those of every response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def draining() -> ApiError:
    """The server is about to exit."""
    return ApiError(503, "the server is shutting down; try another one", code="shutting_down", retry_after=1)
