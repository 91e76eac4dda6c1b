"""Errors as OpenAI's API has them: `{"error": {"message", "type", "param", "code"}}`.

>>> error = ApiError(404, "there is no model x, only tiny", "model", "model_not_found")
>>> error.body["error"]["type"]
'not_found_error'

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error"}

# pydantic's types of errors, and our words for them.
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is no field that this server knows: leave it out",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "none_required": "must be null",
    "too_long": "is too long",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
}

_CODES = {
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
    "missing": "missing_required_parameter",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: for people.
        param: the field that is wrong, as `messages[0].content`.
        code: for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, in plain words."""
    first = errors[0]
    kind, path = first["type"], path_of(first["loc"])
    if kind == "json_invalid":
        return ApiError(400, "the body is no JSON")
    if not path and kind in _WORDS:
        return ApiError(400, "the body must be a JSON object")
    if kind == "unsupported":
        owner, _, _ = path.rpartition(".")
        message = f"{owner}: {first['msg']}" if owner or "[" in path else first["msg"]
    else:
        words = _WORDS.get(kind)
        said = first["msg"] if words is None else words.format(**_limits(first.get("ctx", {})))
        message = f"{path or 'the body'} {said}"
    return ApiError(400, message, path or None, _CODES.get(kind))


def _limits(context: Mapping[str, Any]) -> dict[str, Any]:
    """What an error says of a limit, 2.0 as 2."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in context.items()
    }


def ascii_only(text: str, most: int = 200) -> str:
    """What a client sent, for a message: in letters that any answer can carry, and not too long."""
    return text.encode("ascii", "backslashreplace").decode()[:most]


def path_of(location: Sequence[int | str]) -> str:
    """A place in a request: `messages[0].content`."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else step
    return ascii_only(path)
