"""All faults by name, for the remote control and for help texts."""

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Final

from perqueue.sandbox import _bad_answers, _bad_lines
from perqueue.sandbox._fault import Fault

FAULTS: Final[Mapping[str, type[Fault]]] = {
    kind.name: kind
    for module in (_bad_answers, _bad_lines)
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, Fault) and kind is not Fault
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultDescription:
    """One fault, in words."""

    name: str
    """As the remote control and the request log call it."""
    parameters: str
    """Names and defaults, such as `seconds=1.0`; a name alone is required."""
    summary: str
    """What it does, on one line."""


def describe_faults() -> tuple[FaultDescription, ...]:
    """Return all faults that there are, sorted by name."""
    return tuple(
        FaultDescription(
            name=name,
            parameters=", ".join(_parameter(option) for option in _options(kind)),
            summary=(inspect.getdoc(kind) or "").partition("\n")[0],
        )
        for name, kind in sorted(FAULTS.items())
    )


def make_fault(name: str, parameters: Mapping[str, Any]) -> Fault:
    """Make a fault from JSON-able values.

    Raises:
        ValueError: There is no such fault, or it does not take these parameters; the text says which.
    """
    kind = FAULTS.get(name)
    if kind is None:
        raise ValueError(f"no fault is called {name!r}; there are {', '.join(sorted(FAULTS))}")
    hints = typing.get_type_hints(kind)
    known = {option.name for option in _options(kind)}
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"{name} has no parameter {key!r}; it has {sorted(known)}")
        if not _fits(value, hints[key]):
            raise ValueError(f"{name}: {key} cannot be {value!r}")
    try:
        return kind(**parameters)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _options(kind: type[Fault]) -> list[Field[Any]]:
    options = [option for option in fields(kind) if option.init]
    return sorted(options, key=lambda option: option.kw_only is True)


def _parameter(option: Field[Any]) -> str:
    return option.name if option.default is MISSING else f"{option.name}={option.default!r}"


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is types.UnionType:
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
