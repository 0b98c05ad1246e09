"""What went wrong, as OpenAI's API says it: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from instar.errors import UserError

log = logging.getLogger(__name__)


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every answer that is not what was asked for."""

    error: ErrorBody


class ApiError(Exception):
    """A request that is not answered as its sender hoped.

    Args:
        status: The HTTP status.
        message: What is wrong and what to do about it.
        code: A word that programs can compare.
        param: The field that is wrong.
        headers: HTTP headers to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        # Half a surrogate pair may come in with a message that quotes the request.
        message = self.message.encode(errors="replace").decode()
        error = ErrorBody(
            message=message, type=_type(self.status), param=self.param, code=self.code
        )
        return ErrorReply(error=error).model_dump()

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def later(message: str, code: str, wait_s: float, status: int = 429) -> ApiError:
    """An error that says when to try again."""
    wait = str(max(1, math.ceil(wait_s)))
    return ApiError(status, message, code, headers={"Retry-After": wait})


def _type(status: int) -> str:
    """OpenAI's word for a kind of error."""
    words = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return words.get(status, "invalid_request_error" if status < 500 else "server_error")


def told(error: Exception, where: str) -> ApiError:
    """What a client is told of an error.

    Args:
        error: What was raised.
        where: The path that was asked for, for the log.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error), "invalid_value")
    if isinstance(error, RequestValidationError):
        return _explained(error)
    if isinstance(error, HTTPException):
        detail = str(error.detail)
        if error.status_code == 400 and "parsing" in detail:
            detail = "the body is not JSON in UTF-8. Send an object like those of /openapi.json."
        return ApiError(error.status_code, detail, headers=error.headers)
    log.error("a fault of ours at %s", where, exc_info=error)
    return ApiError(500, "a fault of the server; its log says more", "internal")


def handle_errors(app: FastAPI) -> None:
    """Give every error of an app the shape of ``ErrorReply``."""

    async def answer(request: Request, error: Exception) -> Response:
        return told(error, request.url.path).response()

    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _explained(error: RequestValidationError) -> ApiError:
    """The first mistake of a body, in one sentence."""
    first = error.errors()[0]
    if first["type"] in ("json_invalid", "model_attributes_type", "dict_type"):
        return ApiError(
            400,
            "the body is not a JSON object (with the header Content-Type: application/json)",
            "invalid_json",
        )
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place or 'the body'}: {message}", "invalid_value", place or None)
