"""Tokens and their scopes."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

DEFAULT_TOKENS: Final[Mapping[str, Iterable[str]]] = {
    "sandbox-activity-token": ["activity"],
    "sandbox-reporting-token": ["reporting"],
}
SCOPES: Final = frozenset({"activity", "reporting"})


def check_tokens(tokens: Mapping[str, Iterable[str]]) -> Mapping[str, frozenset[str]]:
    """Freeze a mapping of token to scopes; an unknown scope is a `ValueError`."""
    frozen = {
        token: frozenset({scopes} if isinstance(scopes, str) else scopes) for token, scopes in tokens.items()
    }
    unknown = frozenset().union(*frozen.values()) - SCOPES
    if unknown:
        message = f"unknown scopes {sorted(unknown)}: Per has {sorted(SCOPES)}"
        raise ValueError(message)
    return MappingProxyType(frozen)


def first_with(tokens: Mapping[str, frozenset[str]], scope: str) -> str:
    """Return the first token that has this scope, or else the one that has it by default."""
    named = (token for token, scopes in tokens.items() if scope in scopes)
    return next(named, f"sandbox-{scope}-token")
