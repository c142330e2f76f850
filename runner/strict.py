"""The frozen base class of all typed records, and the types of their values: texts, and mappings
and lists that cannot be changed.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainSerializer,
    StringConstraints,
    ValidationInfo,
)

Text = Annotated[str, StringConstraints(min_length=1)]


# The validation context for a recipe in a run directory: values that were accepted when the run was
# made stay readable.
STORED: Final = {"is_stored": True}


def is_stored(info: ValidationInfo) -> bool:
    """True if the recipe is read from a run directory."""
    return bool(info.context and info.context.get("is_stored"))


class Section(BaseModel):
    """A part of a recipe: frozen, no unknown keys, no coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def freeze(value: Any) -> Any:
    """`value` with every mapping read-only and every list a tuple, at any depth."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: freeze(item) for key, item in value.items()})
    return tuple(freeze(item) for item in value) if isinstance(value, list | tuple) else value


def thaw(value: Any) -> Any:
    """The reverse of `freeze`: plain dicts and lists, for JSON and for Hugging Face."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, list | tuple) else value


def _restore(content: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(content)


def _reduce(mapping: MappingProxyType[Any, Any]) -> tuple[Any, ...]:
    return _restore, (dict(mapping),)


# Python cannot pickle or deep-copy a read-only mapping; notebooks cache runs and send them to other
# processes.
copyreg.pickle(MappingProxyType, _reduce)

FrozenDict = Annotated[dict[str, Any], AfterValidator(freeze), PlainSerializer(thaw)]
FrozenList = Annotated[list[Any], AfterValidator(freeze), PlainSerializer(thaw)]


def list_texts(value: Any) -> Iterator[str]:
    """All texts within a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from list_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from list_texts(item)
