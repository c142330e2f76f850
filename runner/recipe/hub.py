"""Names on the hub: those that a recipe loads, the commit that each resolves to, and the files of a
commit in the hub's cache on this machine.

A branch moves, a commit does not. Once a name is resolved, everything is loaded by its commit.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard

from runner.errors import RefusedError
from runner.recipe.contents import list_content_paths
from runner.recipe.data_section import DataSource
from runner.recipe.parse import Recipe
from runner.recipe.schema import ModelSection

HubKind = Literal["model", "dataset"]

_COMMIT: Final = re.compile("[0-9a-f]{40}")
DEFAULT_BRANCH: Final = "main"
# The hub usually answers in well under a second.
_ANSWER_SECONDS: Final = 10.0
# A hub that did not answer is not queried again for this long, or each run of a sweep would wait.
_SILENCE_SECONDS: Final = 30.0
# HTTP statuses after which a later request may succeed.
_TRY_LATER: Final = (408, 425, 429)
# Files of a model other than its weights: configurations, vocabularies, chat templates.
_ALL_BUT_WEIGHTS: Final = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"),
    *("*.bpe", "*.codes", "*.spm", "*.vocab", "tokenizer.model*"),
)
# The same in folders, which hold other formats of the same model. Templates may be in a folder.
_IN_FOLDERS: Final = tuple(f"*/{one}" for one in _ALL_BUT_WEIGHTS if one != "*.jinja")


@dataclass(frozen=True, order=True)
class HubName:
    """A name of a model or a data set, with the revision that the recipe states: a branch, a tag, a
    commit, or None.
    """

    kind: HubKind
    name: str
    revision: str | None = None

    @property
    def branch(self) -> str:
        """The revision to look up: the stated one, or the default branch."""
        return self.revision or DEFAULT_BRANCH

    @property
    def is_fixed(self) -> bool:
        """True if the recipe states a commit, which never moves."""
        return is_commit(self.revision)

    def __str__(self) -> str:
        stated = "" if self.revision is None else f", revision `{self.revision}`"
        return f"the {'data set' if self.kind == 'dataset' else 'model'} {self.name}{stated}"


def is_commit(revision: str | None) -> TypeGuard[str]:
    """True for a revision that never moves: 40 hexadecimal digits.

    >>> is_commit("main"), is_commit(None), is_commit("0" * 40)
    (False, False, True)
    """
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def _list_named(recipe: Recipe) -> dict[str, ModelSection | DataSource]:
    """Everything that has a path and a revision, by dotted key."""
    sources = recipe.data.sources.items()
    return {"model.path": recipe.model, **{f"data.{key}.path": one for key, one in sources}}


def name_at(recipe: Recipe, key: str) -> HubName | None:
    """The name under a dotted key; None if the recipe lacks the key."""
    named = _list_named(recipe).get(key)
    if named is None:
        return None
    return HubName("model" if key == "model.path" else "dataset", named.path, named.revision)


def list_hub_names(recipe: Recipe) -> dict[str, HubName]:
    """The names that the recipe loads from the hub, by dotted key; local paths are left out."""
    local = list_content_paths(recipe)
    names = {key: name_at(recipe, key) for key in _list_named(recipe) if key not in local}
    return {key: name for key, name in names.items() if name is not None}


def pin(recipe: Recipe, commits: Mapping[str, str]) -> Recipe:
    """The recipe with each name under a dotted key of `commits` at that commit, for loading.

    Its digest differs: the recipe as written identifies a run.
    """
    return _restate(recipe, {key: one for key, one in commits.items()})


def state_as_before(recipe: Recipe, before: Recipe, commits: Mapping[str, str]) -> Recipe:
    """The recipe with the revisions that it stated `before`, if it now states the commits that they
    resolved to. Writing down the commits that a run loaded does not make it another experiment.
    """
    stated: dict[str, str | None] = {}
    for key, commit in commits.items():
        now, then = name_at(recipe, key), name_at(before, key)
        if now is not None and then is not None and now.revision == commit:
            stated[key] = then.revision
    return _restate(recipe, stated)


def _restate(recipe: Recipe, revisions: Mapping[str, str | None]) -> Recipe:
    if not revisions:
        return recipe
    named = {
        key: one.model_copy(update={"revision": revisions[key]}) if key in revisions else one
        for key, one in _list_named(recipe).items()
    }
    data: dict[str, Any] = {
        split: named[f"data.{split}.path"]
        for split in ("train", "validation", "test")
        if f"data.{split}.path" in named
    }
    if "train" not in data:  # several
        numbers = range(len(recipe.data.train_sources))
        data["train"] = tuple(named[f"data.train.{number}.path"] for number in numbers)
    update = {"model": named["model.path"], "data": recipe.data.model_copy(update=data)}
    return recipe.model_copy(update=update)


class _NoAnswer(OSError):
    """The hub did not return the commit of a name, but may do so later."""

    def __init__(self, name: HubName, why: str) -> None:
        super().__init__(
            f"the hub does not say which commit {name} is ({why}); without a network, set"
            " HF_HUB_OFFLINE=1 to use the cache"
        )
        self.why = why


class CommitFinder:
    """Finds the commit of a name. Queries each name once, so that all runs of a sweep get the same
    commit however long the sweep lasts.
    """

    def __init__(self) -> None:
        self._found: dict[HubName, str] = {}
        self._silence = ""  # the reason why the hub did not answer
        self._silent_until = 0.0  # the time until which it is not queried again

    def find(self, name: HubName) -> str | None:
        """The commit, from the hub or else from its cache. None if the hub refuses or must not be
        queried, and the cache has no commit; then the library that loads the name reports why.

        Raises:
            OSError: the hub does not answer, but may do so later. Loading now would leave the
                commit unknown.
        """
        if name.is_fixed:
            return name.revision
        if name not in self._found:
            commit = self._ask(name)
            if commit is None:
                return None
            self._found[name] = commit
        return self._found[name]

    def _ask(self, name: HubName) -> str | None:
        if time.monotonic() < self._silent_until:
            if (commit := _find_cached(name)) is not None:
                return commit
            raise _NoAnswer(name, self._silence)
        try:
            return _ask_for_commit(name)
        except _NoAnswer as error:
            self._silence = error.why
            self._silent_until = time.monotonic() + _SILENCE_SECONDS
            raise


def _ask_for_commit(name: HubName) -> str | None:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        found = _open_hub().resolve_revision(name.name, repo_type=name.kind, revision=name.revision)
        commit = str(found.resolved)
        if is_commit(commit):
            return commit
        why = f"it answered {commit[:50]!r}"
    except RevisionNotFoundError:
        return None
    except Exception as error:  # of a dozen kinds: no such name, no right to read it, no network
        if _is_final(error):
            return _find_cached(name)
        why = f"{type(error).__name__}: {error}"
    if (prepared := _find_only_prepared(name)) is not None:
        return prepared
    raise _NoAnswer(name, why)


def _is_final(error: Exception) -> bool:
    """True if a later request would fail too."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # If hub and cache both fail, `resolve_revision` raises with the hub's error as the cause.
    for one in (error, error.__cause__):
        if isinstance(one, HFValidationError | OfflineModeIsEnabled):
            return True
        if isinstance(one, HfHubHTTPError):
            status = one.response.status_code
            return 400 <= status < 500 and status not in _TRY_LATER
    return False


def _find_cached(name: HubName) -> str | None:
    """The commit of a name in the cache."""
    try:
        found = _open_hub().resolve_revision(
            name.name, repo_type=name.kind, revision=name.revision, local_files_only=True
        )
    except Exception:  # not in the cache, or an invalid name
        return _find_only_prepared(name)
    return str(found.resolved) if is_commit(str(found.resolved)) else None


def _find_only_prepared(name: HubName) -> str | None:
    """The only commit at which `datasets` has prepared rows, which it would load without the hub;
    None if there are none or several.
    """
    if name.kind != "dataset" or name.revision is not None:
        return None
    prepared = {path.name for path in find_prepared(name.name, "*") if is_commit(path.name)}
    return prepared.pop() if len(prepared) == 1 else None


def _open_hub() -> Any:
    """The hub's client, with a timeout of a few seconds."""
    from huggingface_hub import HfApi  # 0.3 s, and only runs that load from the hub need it

    class QuickHfApi(HfApi):
        def repo_info(self, *arguments: Any, **named: Any) -> Any:
            return super().repo_info(*arguments, **{**named, "timeout": _ANSWER_SECONDS})

    return QuickHfApi()


def is_offline() -> bool:
    """True if the environment keeps the hub's client offline."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def require_commit(key: str, name: HubName, commit: str) -> None:
    """Check that the cache has the files of a commit, or else that the hub does. If the hub does
    not answer, loading reports the error.

    Raises:
        RefusedError: neither has it, or the hub does not let this machine read it.
    """
    if is_cached(name.kind, name.name, commit):
        return
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    loaded = f"`{key}`: this run loaded {name.name} at the commit {commit}, which is"
    try:
        _open_hub().repo_info(name.name, repo_type=name.kind, revision=commit)
    except RevisionNotFoundError:
        raise RefusedError(
            f"{loaded} neither in the cache of this machine nor on the hub any more",
            hint="restore it in the cache, or start again with `runner launch RECIPE --fresh`",
        ) from None
    except HfHubHTTPError as error:
        # The hub returns the same status for a private, a gated and a missing repository.
        if error.response.status_code not in (401, 403, 404):
            return
        raise RefusedError(
            f"{loaded} not in the cache of this machine, and the hub refuses {name.name} to this"
            f" user ({type(error).__name__}): either it needs a token that may read it, or it was"
            " deleted",
            hint="run `hf auth login` or set HF_TOKEN; if it was deleted, start again with"
            " `runner launch RECIPE --fresh`",
        ) from None
    except Exception:  # for example no network
        return


def is_cached(kind: HubKind, name: str, commit: str) -> bool:
    """True if all files that are read of a commit are in the cache of this machine."""
    if kind == "dataset":
        return find_prepared(name, commit) != []
    return fetch_model(name, commit, with_weights=True, asks_hub=False)


def load_arguments(model: ModelSection, *, with_weights: bool = False) -> dict[str, Any]:
    """`from_pretrained`'s arguments for the model's revision. A commit is loaded only from the
    cache, after its missing files are downloaded. Otherwise the libraries would query the hub at
    each load for files that the model does not have.
    """
    arguments: dict[str, Any] = {"revision": model.revision}
    if is_commit(model.revision) and not Path(model.path).exists():
        is_here = fetch_model(model.path, model.revision, with_weights=with_weights)
        arguments["local_files_only"] = is_here
    return arguments


def fetch_model(name: str, commit: str, *, with_weights: bool, asks_hub: bool = True) -> bool:
    """True if the files of a model are in the cache, after downloading them if necessary. Does not
    query the hub if they were there.

    A cache that another program filled does not list the files of a commit. Then the hub is
    queried. If it does not answer (after squashing its history, for example), the files in the
    cache are used.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=commit,
                allow_patterns=list(_ALL_BUT_WEIGHTS),
                ignore_patterns=list(_IN_FOLDERS),
                local_files_only=not asks_hub,
            )
        )
        if not with_weights:
            return (folder / "config.json").exists()
        files = _list_weights(folder)
        if asks_hub and not all((folder / file).exists() for file in files):
            snapshot_download(name, revision=commit, allow_patterns=files)
        return all((folder / file).exists() for file in files)
    except Exception:  # of a dozen kinds; loading reports the error
        return asks_hub and fetch_model(name, commit, with_weights=with_weights, asks_hub=False)


def _list_weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))


def find_prepared(name: str, commit: str) -> list[Path]:
    """The folders in which `datasets` keeps the rows of a data set at a commit, one per config."""
    from huggingface_hub import constants

    stated = os.environ.get("HF_DATASETS_CACHE")
    cache_dir = Path(stated) if stated else Path(constants.HF_HOME) / "datasets"
    *owner, own = name.split("/")
    # A copy of `datasets.naming.camelcase_to_snakecase`, whose import takes a second.
    own = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", own)
    own = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", own).lower()
    found = cache_dir.expanduser() / "___".join([*owner, own])
    return sorted(path for path in found.glob(f"*/*/{commit}") if _is_whole(path))


def _is_whole(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists()
