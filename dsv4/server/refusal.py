"""What a client is told when it cannot have what it asked for, in OpenAI's shape or Anthropic's."""

from __future__ import annotations

from typing import Any

from dsv4.errors import DSV4Error, NumericsError

MESSAGES = "/v1/messages"  # here and below it the clients are Anthropic's
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = _TYPES | {
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Refusal(DSV4Error):
    """An answer that is no answer: HTTP status, OpenAI's `code` and `param`, and when to come again (seconds)."""

    def __init__(
        self,
        what: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        got: object = None,
        wanted: object = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what, got=got, wanted=wanted, do=do)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to it."""
        if self.status == 504:  # OpenAI's clients would ask twice more in silence, and take three times as long
            return {"x-should-retry": "false"}
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def refused(error: DSV4Error) -> Refusal:
    """Any error of ours as a refusal: numbers that are none are the server's fault, all else the request's."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, NumericsError):
        return Refusal(str(error), status=500, code="not_finite")
    return Refusal(str(error), param=error.what if error.what.isidentifier() else None)


def anthropic(path: str) -> bool:
    """Whether those who ask for `path` look for Anthropic's shapes."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def body(refusal: Refusal, path: str = "") -> dict[str, Any]:
    """The JSON of a refusal, as those who ask for `path` look for it."""
    if anthropic(path):
        known = _ANTHROPIC_TYPES.get(refusal.status, "invalid_request_error")
        return {"type": "error", "error": {"type": known, "message": str(refusal)}}
    kind = _TYPES.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}
