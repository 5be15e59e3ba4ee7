"""Calls: a table of methods with their parameters, and what a line from a client asks of it. Knows no socket."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pyhyve.base.errors import PyhyveError
from pyhyve.base.parser import did_you_mean
from pyhyve.base.wire import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    REFUSED,
    Id,
    RpcError,
    decode,
)

_TYPE_NAMES: Final = {int: "integer", bool: "boolean", str: "string"}
_MAX_ID: Final = 256
"""Characters of a request's id: it is sent back."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A named parameter: its type (int, bool or str) and what it is for. All are optional."""

    kind: type
    help: str


@dataclass(frozen=True, slots=True)
class Method:
    """A method: what it does, its parameters, its function (called with them by name, returns plain values).

    pauses: the guest stands still meanwhile, so that calls are spread out.
    """

    call: Callable[..., object]
    help: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    pauses: bool = False

    def describe(self) -> dict[str, object]:
        params = {name: {"type": _TYPE_NAMES[each.kind], "help": each.help} for name, each in self.parameters.items()}
        return {"help": self.help, "params": params, "pauses": self.pauses}


@dataclass(frozen=True, slots=True)
class Call:
    """A request that may be carried out. number: its id; answered: it has one (a notification has none)."""

    method: Method
    params: Mapping[str, Any]
    number: Id
    answered: bool


@dataclass(frozen=True, slots=True)
class BadCall:
    """A request that may not, and the id to answer to."""

    error: RpcError
    number: Id = None
    answered: bool = True


def parse(line: bytes, methods: Mapping[str, Method]) -> Call | BadCall:
    """Say what a line asks for. Never raises."""
    try:
        document = decode(line)
    except RpcError as error:
        return BadCall(error)
    if not isinstance(document, dict):
        kind = "an array (no batches here)" if isinstance(document, list) else "no object"
        return BadCall(RpcError(INVALID_REQUEST, f"a request is an object in a line of its own, not {kind}"))
    number, answered = document.get("id"), "id" in document
    if isinstance(number, bool) or not isinstance(number, str | int | float | None) or len(str(number)) > _MAX_ID:
        return BadCall(RpcError(INVALID_REQUEST, f"'id' is a number or a string of at most {_MAX_ID} characters"))
    try:
        return Call(*_look_up(document, methods), number, answered)
    except RpcError as error:
        # What is no request is no notification either.
        return BadCall(error, number, answered or error.code == INVALID_REQUEST)


def _look_up(document: Mapping[str, Any], methods: Mapping[str, Method]) -> tuple[Method, Mapping[str, Any]]:
    if document.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, "'jsonrpc' must be \"2.0\"")
    name, params = document.get("method"), document.get("params", {})
    if not isinstance(name, str):
        raise RpcError(INVALID_REQUEST, "'method' must be a string")
    method = methods.get(name)
    if method is None:
        shown = name[:64]
        raise RpcError(METHOD_NOT_FOUND, f"{shown!r}: no such method{did_you_mean(shown, methods)}")
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, "'params' must be an object: parameters go by name")
    for key, value in params.items():
        parameter = method.parameters.get(key)
        if parameter is None:
            shown = key[:64]
            raise RpcError(INVALID_PARAMS, f"{name}: no parameter {shown!r}{did_you_mean(shown, method.parameters)}")
        if value is not None and (not isinstance(value, parameter.kind) or _is_bool_for_int(value, parameter.kind)):
            raise RpcError(INVALID_PARAMS, f"{name}: {key} must be of type {_TYPE_NAMES[parameter.kind]}")
    return method, {key: value for key, value in params.items() if value is not None}


def _is_bool_for_int(value: object, kind: type) -> bool:
    return kind is int and isinstance(value, bool)


def carry_out(call: Call) -> object:
    """Call the method. RpcError for whatever goes wrong in it."""
    try:
        return call.method.call(**call.params)
    except PyhyveError as error:
        raise RpcError(REFUSED, str(error)) from None
    except Exception as error:
        # A method's bug is the client's to hear of, not the guest's to suffer from.
        text = str(error).splitlines()
        raise RpcError(INTERNAL_ERROR, f"{type(error).__name__}: {text[0][:200] if text else ''}") from error
