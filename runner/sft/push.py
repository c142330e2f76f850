"""Sending an exported folder to the hub: where to, under which token, and in which words it is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import RefusedError, RunnerError
from runner.recipe import Recipe

# What a push takes away from the repository unless it writes it anew: an adapter must not lie beside other weights.
_WEIGHT_FILES: Final = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json")


class PushError(RunnerError):
    """The hub did not take the model; the exported folder stays where it is."""


@dataclass(frozen=True)
class HubTarget:
    """A repository on the hub and the token that may write to it, which is shown nowhere."""

    repo_id: str
    is_private: bool
    token: str

    def __repr__(self) -> str:
        return f"HubTarget({self.repo_id})"

    @classmethod
    def of(cls, recipe: Recipe, repo_id: str = "") -> HubTarget:
        """The repository, by default the recipe's own. Raises: RefusedError, without a repository or a token."""
        repo_id = repo_id or recipe.tracking.hub_model_id or ""
        token = os.environ.get("HF_TOKEN", "").strip()
        if not repo_id:
            raise RefusedError(
                f"the recipe of {recipe.run.name} has no `tracking.hub_model_id`, so there is nowhere to push to",
                hint="name the repository: --push OWNER/NAME",
            )
        if not token:
            raise RefusedError(
                f"pushing to {repo_id} needs a token with write access",
                hint="set HF_TOKEN in the environment; it is read from nowhere else and stored nowhere",
            )
        return cls(repo_id, recipe.tracking.hub_private, token)


def push_folder(folder: Path, target: HubTarget, message: str) -> str:
    """The address of the commit that holds the folder.

    Raises:
        PushError: the hub refuses, cannot be reached, or has a public repository under a name that should be private.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=target.token)
    print(f"pushing to {target.repo_id}", file=sys.stderr, flush=True)
    with _in_our_words(folder, target):
        api.create_repo(target.repo_id, private=target.is_private, exist_ok=True)
        if target.is_private and not api.repo_info(target.repo_id).private:
            raise PushError(
                f"{target.repo_id} is public, and `tracking.hub_private` is true: nothing was pushed",
                hint="make the repository private, or set `tracking.hub_private: false`",
            )
        commit = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(_WEIGHT_FILES),
        )
    return str(commit.commit_url)


@contextmanager
def _in_our_words(folder: Path, target: HubTarget) -> Iterator[None]:
    """Errors of the hub, the token cut out of them should they hold it."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as HttpError  # type: ignore[attr-defined]  # the library below may change

    try:
        yield
    except (HttpError, HFValidationError, OfflineModeIsEnabled, ValueError, OSError) as error:
        text = " ".join(str(error).split()).replace(target.token, "***")
        raise PushError(
            f"{folder} was not pushed to {target.repo_id}: {text}",
            hint=f"hf upload {target.repo_id} {folder}  # once the reason is gone: the folder is complete",
        ) from None
