"""What a grid file may hold where, told in its own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flags import UserError


def mapping(what: str, value: Any) -> Mapping[str, Any]:
    """The value, whose keys are text.

    Raises:
        UserError: if it is another.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{what} must be names with values, such as {{epochs: 20}} or {{}}, got {value!r}")
    return value


def items(what: str, value: Any, *, least: int = 1) -> Sequence[Any]:
    """The value, a list.

    Raises:
        UserError: if it is something else, or too short.
    """
    if not isinstance(value, (list, tuple)) or len(value) < least:
        raise UserError(f"{what} must be a list{' that is not empty' if least else ''}, got {value!r}")
    return value


def mappings(what: str, value: Any, *, least: int = 1) -> list[Mapping[str, Any]]:
    """The value, a list of mappings."""
    return [mapping(f"each of the {what}", item) for item in items(what, value, least=least)]


def seeds(what: str, value: Any) -> None:
    """Refuse what are no seeds, and one that would count twice."""
    for seed in items(what, value):
        if type(seed) is not int or seed < 0:
            raise UserError(f"{what} must be whole numbers >= 0, got {seed!r}")
    if len(set(value)) < len(value):
        raise UserError(f"{what} must be different, as a run that counts twice makes intervals too narrow, got {value}")
