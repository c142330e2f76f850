"""Records on disk: their common type, the types of their fields, and how a file becomes one."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from runner.errors import CorruptFileError, escape_controls
from runner.files import parse_json, read_plain
from runner.strict import STORED


class Fact(BaseModel):
    """A record on disk: frozen; fields that a newer version added are kept out, missing ones are an
    error.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")


# What is shown in terminals, whoever wrote the file: a run directory may come from somebody else.
Shown = Annotated[str, AfterValidator(escape_controls)]


def _require_zone(text: str) -> str:
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a moment without its time zone")
    return text


Moment = Annotated[str, AfterValidator(_require_zone)]  # ISO 8601, UTC

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=1, lt=2**63)]  # of what there is at least one of
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

Loaded = TypeVar("Loaded", bound=Fact)


def load_fact(path: Path, kind: type[Loaded]) -> Loaded | None:
    """Raises: CorruptFileError for a file of another shape."""
    content = read_plain(path)  # None is told from `null` by one look: it may be written meanwhile
    return None if content is None else parse_fact(content, path, kind)


def parse_fact(content: bytes, path: Path, kind: type[Loaded]) -> Loaded:
    with contextlib.suppress(ValidationError):
        return kind.model_validate_json(content, context=STORED)
    # Python's reader takes some texts that pydantic's does not, and says what is no JSON at all.
    try:
        text = json.dumps(parse_json(content, path))
        return kind.model_validate_json(text, context=STORED)
    except ValidationError as error:
        first = error.errors()[0]
        # Keys are anybody's: those of a mapping may hold what a terminal takes for commands
        key = escape_controls(".".join(str(part) for part in first["loc"])) or "its content"
        raise CorruptFileError(f"{path} cannot be read: {key}: {first['msg']}") from None
