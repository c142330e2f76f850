"""Records on disk: their common type, the types of their fields, and how a file is parsed
into one.
"""

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
    """A record on disk, frozen. Fields added by a newer version are ignored; a missing field is an
    error.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")


# Text that is shown in terminals. Any program may have written the file, because run directories
# are passed between people.
Shown = Annotated[str, AfterValidator(escape_controls)]


def _require_zone(text: str) -> str:
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a time zone")
    return text


Moment = Annotated[str, AfterValidator(_require_zone)]  # ISO 8601, UTC

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=1, lt=2**63)]  # at least one
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

Loaded = TypeVar("Loaded", bound=Fact)


def load_fact(path: Path, kind: type[Loaded]) -> Loaded | None:
    """Raises: CorruptFileError for a file of another shape."""
    content = read_plain(path)  # a single read: the file may appear between two; None is not `null`
    return None if content is None else parse_fact(content, path, kind)


def parse_fact(content: bytes, path: Path, kind: type[Loaded]) -> Loaded:
    with contextlib.suppress(ValidationError):
        return kind.model_validate_json(content, context=STORED)
    # Python's reader accepts some texts that pydantic's does not, and says which ones are not JSON
    # at all.
    try:
        text = json.dumps(parse_json(content, path))
        return kind.model_validate_json(text, context=STORED)
    except ValidationError as error:
        first = error.errors()[0]
        # Keys are not trusted: those of a mapping may hold terminal control sequences.
        key = escape_controls(".".join(str(part) for part in first["loc"])) or "its content"
        raise CorruptFileError(f"{path} cannot be read: {key}: {first['msg']}") from None
