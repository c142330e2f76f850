"""Judges the masks of every chat template in a folder with an oracle that knows no template.

    python benchmarks/mask_oracle.py FOLDER [--json] [--jobs 2]

FOLDER holds `<family>__<name>.jinja`, and may hold `index.tsv` with the columns `file`, `bos` and
`eos` (others are left alone). About fifty conversations of sentinel words (rounds, tool calls,
reasoning, think tags, chosen turns) are masked under each template. A mask is either refused, or

- its `input_ids` are the template's own rendering, tokenized;
- what it trains holds every word of the assistant's that the template printed for the wanted turns,
  the names and keys of calls, and all that generation writes before them; none of anybody else's;
- each completion is more than its end, and ends at a token that stops the model: one that the
  template prints both where a conversation stops and where somebody speaks next, or EOS;
- a turn that the template prints otherwise than it was written is marked as such;
- no text of the row is left out in silence.

Prints what is right, refused (and why) and wrong, by family. The exit status is 1 where anything is
wrong, 0 otherwise. A template runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.mask_oracle_chats import MOMENT, Setting, build_tokenizer, conversations  # noqa: E402
from benchmarks.mask_oracle_judge import (  # noqa: E402
    NO_END,
    REFUSED,
    RIGHT,
    WRONG,
    Oracle,
    Verdict,
    guess_end_of_turn,
    guess_eos,
    judge,
)
from runner.data.chat_template import ChatFormat  # noqa: E402
from runner.data.masking import ConversationMasker  # noqa: E402

DEFAULT_SETTING: Final = Setting()
MAX_MEMORY_GIB: Final = 6  # of address space, for a template that prints without end
MaskerBuilder = Callable[[Any, Setting], Any]


def build_masker(tokenizer: Any, setting: Setting) -> ConversationMasker:
    """The masker that runs use, with the clock at the moment of the oracle's renderings."""
    chat_format = ChatFormat(setting.template_kwargs, MOMENT, setting.end_of_turn)
    return ConversationMasker(tokenizer, chat_format)


@dataclass(frozen=True)
class TemplateResult:
    """The verdicts on one template, by conversation; `failure` where there are none."""

    name: str
    verdicts: Mapping[str, Verdict]
    failure: str = ""

    @property
    def family(self) -> str:
        return self.name.partition("__")[0]

    @property
    def verdict(self) -> str:
        """`wrong` where anything is, `refused` where nothing is right, else `right`."""
        kinds = {each.verdict for each in self.verdicts.values()}
        return next((kind for kind in (WRONG, RIGHT) if kind in kinds), REFUSED)


def judge_template(
    template: str,
    bos: str = "",
    eos: str = "",
    setting: Setting = DEFAULT_SETTING,
    build: MaskerBuilder = build_masker,
) -> dict[str, Verdict]:
    """The verdict on each conversation under one template; `build` makes what is judged.

    Where the template ends no turn, the conversations are judged once more with `end_of_turn`.
    """
    oracle = Oracle(build_tokenizer(template, bos, eos), setting)
    if not eos and "eos_token" not in template and (guessed := guess_eos(oracle)):
        oracle = Oracle(build_tokenizer(template, bos, guessed), setting)
    masker = build(oracle.tokenizer, setting)
    verdicts = {chat.name: judge(oracle, masker.mask, chat) for chat in conversations()}
    endless = {chat for chat, verdict in verdicts.items() if verdict.why == NO_END}
    if endless and setting.end_of_turn is None:
        setting = replace(setting, end_of_turn=guess_end_of_turn(oracle))
        oracle = Oracle(oracle.tokenizer, setting)
        masker = build(oracle.tokenizer, setting)
        for chat in conversations():
            if chat.name in endless:
                verdicts[f"{chat.name}, end_of_turn"] = judge(oracle, masker.mask, chat)
    return verdicts


def _judge_file(path: Path, bos: str, eos: str, setting: Setting, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_GIB << 30, MAX_MEMORY_GIB << 30))
    try:
        connection.send(judge_template(path.read_text(encoding="utf-8"), bos, eos, setting))
    except Exception as error:  # a hostile template can end this process only
        connection.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def judge_file(
    path: Path, bos: str, eos: str, setting: Setting, time_limit_seconds: float
) -> TemplateResult:
    """The verdicts on one template, found by a child process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_judge_file, args=(path, bos, eos, setting, sender), daemon=True
    )
    child.start()
    sender.close()
    try:
        if not receiver.poll(time_limit_seconds):
            return TemplateResult(path.stem, {}, f"took more than {time_limit_seconds:g} seconds")
        answer = receiver.recv()
    except EOFError:
        return TemplateResult(path.stem, {}, "its process ended early")
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(answer, str):
        return TemplateResult(path.stem, {}, answer)
    return TemplateResult(path.stem, answer)


def read_index(folder: Path) -> dict[str, tuple[str, str]]:
    """BOS and EOS of each file that `index.tsv` knows them of; empty texts where it does not."""
    path = folder / "index.tsv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {row["file"]: (row.get("bos") or "", row.get("eos") or "") for row in rows}


def judge_folder(
    folder: Path,
    *,
    time_limit_seconds: float,
    num_jobs: int,
    only: str = "",
    setting: Setting = DEFAULT_SETTING,
) -> list[TemplateResult]:
    """The verdicts on every template of the folder whose name holds `only`, by name."""
    index = read_index(folder)
    paths = sorted(path for path in folder.glob("*.jinja") if only in path.stem)

    def run(path: Path) -> TemplateResult:
        return judge_file(path, *index.get(path.name, ("", "")), setting, time_limit_seconds)

    with ThreadPoolExecutor(num_jobs) as pool:
        results = []
        for done, result in enumerate(pool.map(run, paths), start=1):
            results.append(result)
            if done % 20 == 0:
                print(f"{done} of {len(paths)} templates", file=sys.stderr)
        return results


# --- reporting


def _all_verdicts(results: Iterable[TemplateResult]) -> Iterator[Verdict]:
    return (verdict for result in results for verdict in result.verdicts.values())


def _count(results: Sequence[TemplateResult], kind: str) -> int:
    return sum(verdict.verdict == kind for verdict in _all_verdicts(results))


def report_lines(results: Sequence[TemplateResult]) -> Iterator[str]:
    """The table by family, the reasons of refusals by count, and each wrong mask."""
    yield f"{'family':<14}{'templates':>10}{'right':>8}{'refused':>9}{'avoidable':>11}{'wrong':>7}"
    families = sorted({result.family for result in results})
    groups = {family: [r for r in results if r.family == family] for family in families}
    for name, group in [*groups.items(), ("all", list(results))]:
        avoidable = sum(verdict.is_avoidable for verdict in _all_verdicts(group))
        yield (
            f"{name:<14}{len(group):>10}{_count(group, RIGHT):>8}{_count(group, REFUSED):>9}"
            f"{avoidable:>11}{_count(group, WRONG):>7}"
        )
    for kind in (REFUSED, WRONG):
        reasons = Counter(v.why for v in _all_verdicts(results) if v.verdict == kind)
        yield f"\n{kind}, why:"
        yield from (f"{count:>7}  {why}" for why, count in reasons.most_common())
    notes = Counter(note for verdict in _all_verdicts(results) for note in verdict.notes)
    yield "\nright, but:"
    yield from (f"{count:>7}  {note}" for note, count in notes.most_common())
    failed = [result for result in results if result.failure]
    yield f"\ntemplates that could not be judged: {len(failed)}"
    yield from (f"  {result.name}: {result.failure}" for result in failed)
    for result in results:
        shown: set[str] = set()
        for chat, verdict in result.verdicts.items():
            if verdict.verdict == WRONG and verdict.why not in shown:  # the first of its kind
                shown.add(verdict.why)
                yield f"\nwrong: {result.name}, {chat}: {verdict.why}\n  {verdict.detail[:600]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder of .jinja templates")
    parser.add_argument("--json", action="store_true", help="every verdict, as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="templates at a time")
    parser.add_argument("--only", default="", help="templates whose name holds this text")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for a template")
    parser.add_argument(
        "--template-kwargs", type=json.loads, default={}, help="arguments of the templates, as JSON"
    )
    options = parser.parse_args(arguments)
    results = judge_folder(
        options.folder,
        time_limit_seconds=options.time_limit,
        num_jobs=options.jobs,
        only=options.only,
        setting=Setting(options.template_kwargs),
    )
    if not results:
        parser.error(f"{options.folder} holds no .jinja file whose name holds {options.only!r}")
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1, ensure_ascii=False))
    else:
        print("\n".join(report_lines(results)))
    return int(any(result.verdict == WRONG for result in results))


if __name__ == "__main__":
    sys.exit(main())
