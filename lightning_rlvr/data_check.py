"""`python -m lightning_rlvr data check`: what is wrong with the questions of a config, without loading a model."""

from __future__ import annotations

import json
import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_rlvr.training import RLVRDataModule, RLVRModule
from lightning_rlvr.types import Prompt, UserError

EXAMPLES = 5  # of questions named in a finding
OVERLAP = 0.01  # share of held-out questions that may, by chance, be training questions

_TOKEN = re.compile(r"\w+|[^\w\s]")
_APOSTROPHES = "'\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
_PRIME = "\N{PRIME}"
_DERIVATIVE = re.compile(rf"(?<![\w{_APOSTROPHES}])([^\W\d_])([{_APOSTROPHES}]+)(?!\w)")  # f'(x), not I'm or 'x'
_RAISED, _LOWERED = re.compile("([\u00b2\u00b3\u00b9\u2070-\u207f]+)"), re.compile("([\u2080-\u209c]+)")
_FRACTION = re.compile("([\u00bc-\u00be\u2150-\u215f\u2189])")
_ALIKE = str.maketrans(
    dict.fromkeys(f'{_APOSTROPHES}"`\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}', "")
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", "")  # unseen
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | {"\N{FRACTION SLASH}": "/"}
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a split. An error makes training wrong or impossible, a warning may."""

    level: Literal["error", "warning"]
    split: str
    what: str
    count: int
    message: str
    examples: tuple[str, ...] = ()  # uids


@dataclass
class Report:
    """What there is in each split, and what is wrong."""

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 if nothing makes training wrong, else 1."""
        return int(any(finding.level == "error" for finding in self.findings))

    def add(
        self, level: Literal["error", "warning"], split: str, what: str, found: Sequence[str], message: str
    ) -> None:
        """Note a finding about the questions with these uids, if there are any."""
        if found:
            self.findings.append(Finding(level, split, what, len(found), message, tuple(found[:EXAMPLES])))

    def write(self, folder: Path) -> None:
        """Write data_check.json and data_check.md. Raises: UserError if the folder cannot be written to."""
        try:
            self._write(folder)
        except OSError as error:
            raise UserError(
                f"output must be a folder that can be written, got {folder}: {error}. Set --output."
            ) from error

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"splits": self.splits, "findings": [asdict(finding) for finding in self.findings]}
        (folder / "data_check.json").write_text(json.dumps(facts, indent=2) + "\n")
        lines = ["| split | questions | prompt tokens: least | median | most |", "|---|---|---|---|---|"]
        for split, about in self.splits.items():
            tokens = about.get("prompt_tokens", {})
            lines.append(f"| {split} | {about['questions']} | " + " | ".join(str(v) for v in tokens.values()) + " |")
        lines += ["", "| | split | what | questions | examples | |", "|---|---|---|---|---|---|"]
        for one in self.findings:
            cells = (one.level, one.split, one.what, str(one.count), ", ".join(one.examples), one.message)
            lines.append("| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in cells) + " |")
        (folder / "data_check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def show(self) -> None:
        """Print both tables."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        counts = Table("split", "questions", "prompt tokens: least", "median", "most")
        for split, about in self.splits.items():
            counts.add_row(split, str(about["questions"]), *map(str, about.get("prompt_tokens", {}).values()))
        console.print(counts)
        if not self.findings:
            console.print("Nothing found.")
            return
        table = Table("", "split", "what", "questions", "examples", "", show_lines=True)
        for one in self.findings:
            colour = "red" if one.level == "error" else "yellow"
            cells = (one.split, one.what, str(one.count), "\n".join(one.examples), one.message)
            table.add_row(Text(one.level, colour), *map(Text, cells))
        console.print(table)


def check(data: RLVRDataModule, module: RLVRModule, ngram: int = 13, containment: float = 0.8) -> Report:
    """Return what there is in the data of `fit` and `test`, and what is wrong with it.

    Errors: a split that cannot be loaded, no training questions, an empty question, golds that the reward cannot
    judge and prompts over max_prompt_tokens (warnings where they are dropped), questions that are there twice with
    different golds, held-out questions that are training questions (up to 1 % of a split is a warning), and fewer
    questions than stages. Warnings: repeated questions, empty golds, held-out questions that training questions contain
    (see `contained`), and stages smaller than a rollout batch.

    Args:
        data: the data module of the config.
        module: its module, of which only the reward, the tokenizer and the prompt format are used.
        ngram: words in a row that count as one piece of a question.
        containment: share of a held-out question's pieces in one training question from which it is reported.
    """
    for ok, key, value, rule in (
        (ngram >= 1, "ngram", ngram, "at least 1 word"),
        (0 < containment <= 1, "containment", containment, "in (0, 1]: a share of a question"),
    ):
        if not ok:
            raise UserError(f"{key} must be {rule}, got {value}. Set --{key}.")
    report = Report()
    splits = {split: task for split, task in data.tasks.items() if split != "test" or task is not data.tasks["val"]}
    kept: dict[str, list[Prompt]] = {}
    for split, task in splits.items():
        if task is None:
            continue
        try:
            prompts = task.load()
        except UserError as error:
            report.findings.append(Finding("error", split, "cannot be loaded", 0, str(error)))
            continue
        kept[split] = _check_split(report, split, prompts, data, module)
    if splits["train"] is None:
        report.findings.append(Finding("error", "train", "missing", 0, "there is nothing to train on. Set data.train."))
    if "train" in kept:
        _check_size(report, len(kept["train"]), data)
        for held_out in ("val", "test"):
            if held_out in kept:
                _check_overlap(report, held_out, kept["train"], kept[held_out], ngram, containment)
    module.reward.close()
    return report


def _check_split(
    report: Report, split: str, prompts: list[Prompt], data: RLVRDataModule, module: RLVRModule
) -> list[Prompt]:
    """Check the questions one by one and for repeats; return those that training would use."""
    report.splits[split] = {"questions": len(prompts)}
    if not prompts:
        report.findings.append(Finding("error", split, "empty", 0, f"there are no questions. Set data.{split}."))
        return []
    report.add("error", split, "empty question", [p.uid for p in prompts if not p.text.strip()], "there is no text")
    asked = _check_golds(report, split, prompts, data, module)
    tokenizer = module.policy_source.tokenizer()
    lengths = [len(module.prompt_format.encode(tokenizer, prompt.text)) for prompt in prompts]
    report.splits[split]["prompt_tokens"] = {
        "least": min(lengths),
        "median": int(statistics.median(lengths)),
        "most": max(lengths),
    }
    long = [p.uid for p, length in zip(prompts, lengths, strict=True) if length > data.max_prompt_tokens]
    too_long = set(long)
    kept = [prompt for prompt in asked if prompt.uid not in too_long]
    dropped = data.long_prompts == "drop" and bool(kept)
    report.add(
        "warning" if dropped else "error",
        split,
        "long prompt",
        long,
        f"over {data.max_prompt_tokens} tokens{', dropped' if dropped else ''}. Set data.max_prompt_tokens.",
    )
    _check_repeats(report, split, asked, module)
    return kept


def _check_golds(
    report: Report, split: str, prompts: list[Prompt], data: RLVRDataModule, module: RLVRModule
) -> list[Prompt]:
    """Return the questions that the reward can judge, or all where none is dropped for that."""
    bad = set(module.reward.unjudgeable(prompts))
    rest = [prompt for i, prompt in enumerate(prompts) if i not in bad]
    dropped = data.unjudgeable == "drop" and bool(rest)
    shown = next((prompts[i].answer for i in sorted(bad)), "")
    report.add(
        "warning" if dropped else "error",
        split,
        "unjudgeable gold",
        [prompts[i].uid for i in sorted(bad)],
        f"no response could be judged right, for example by {shown[:80]!r}{', dropped' if dropped else ''}. Set the "
        f"answer keys of data.{split}, or data.unjudgeable.",
    )
    empty = [prompt.uid for prompt in rest if not prompt.answer.strip()]
    report.add("warning", split, "empty gold", empty, "the reward judges without it")
    try:
        module.reward.check(rest)
    except UserError as error:
        report.findings.append(Finding("error", split, "refused by the reward", len(rest), str(error)))
    return rest if dropped else prompts


def _check_repeats(report: Report, split: str, prompts: list[Prompt], module: RLVRModule) -> None:
    """Report questions of equal normalised text: by whether their golds agree with the first's."""
    first: dict[str, Prompt] = {}
    repeats: list[tuple[Prompt, Prompt]] = []
    for prompt in prompts:
        known = first.setdefault(normalised(prompt.text), prompt)
        if known is not prompt:
            repeats.append((known, prompt))
    same = module.reward.equivalent([(a.answer, b.answer) for a, b in repeats])
    pairs = [(f"{b.uid} = {a.uid}", ok) for (a, b), ok in zip(repeats, same, strict=True)]
    agree, contradict = [text for text, ok in pairs if ok], [text for text, ok in pairs if not ok]
    report.add("warning", split, "repeated question", agree, "it counts as often as it occurs. Set the task's unique.")
    report.add("error", split, "contradicting golds", contradict, "one question has two different gold answers")


def _check_size(report: Report, size: int, data: RLVRDataModule) -> None:
    try:
        data.curriculum.check(size)
    except UserError as error:
        report.findings.append(Finding("error", "train", "too few questions", size, str(error)))
        return
    smallest = size // data.curriculum.stages
    if smallest < data.prompts_per_batch:
        message = (
            f"a stage has {smallest} questions, fewer than the {data.prompts_per_batch} of a rollout batch. Set "
            "data.prompts_per_batch or data.curriculum.stages."
        )
        report.findings.append(Finding("warning", "train", "small stage", size, message))


def _check_overlap(
    report: Report, split: str, train: list[Prompt], held_out: list[Prompt], ngram: int, containment: float
) -> None:
    known: dict[str, str] = {}
    for prompt in train:
        known.setdefault(normalised(prompt.text), prompt.uid)
    equal = {p.uid: known[text] for p in held_out if (text := normalised(p.text)) in known}
    named = [f"{uid} = {other}" for uid, other in equal.items()]
    level: Literal["error", "warning"] = "error" if len(equal) > OVERLAP * len(held_out) else "warning"
    message = f"training sees what is held out. Set data.train or data.{split} to other rows."
    report.add(level, split, "training question", named, message)
    rest = [prompt for prompt in held_out if prompt.uid not in equal]
    near = [
        f"{prompt.uid} ~ {train[place].uid} ({share:.2f})"
        for prompt, (share, place) in zip(rest, contained(rest, train, ngram), strict=True)
        if share >= containment
    ]
    message = f"a training question holds {containment:.0%} or more of its runs of {ngram} words"
    report.add("warning", split, "near a training question", near, message)


def normalised(text: str) -> str:
    r"""Return the text as it is compared: compatibility forms and dashes unified, no case, no quotes, single spaces.

    >>> normalised("What\n is  '2+3'?") == normalised("what is 2+3?")
    True
    >>> normalised("f'(3)") == normalised("f(3)")
    False
    """
    return " ".join(tokens(text))


def tokens(text: str) -> list[str]:
    """Return the words, numbers and signs of the normalised text: what is raised, lowered or primed stays apart."""
    text = _DERIVATIVE.sub(lambda found: found[1] + _PRIME * len(found[2]), text)
    if not text.isascii():
        text = _FRACTION.sub(r" \1", _LOWERED.sub(r"_\1", _RAISED.sub(r"^\1", text)))
        text = unicodedata.normalize("NFKC", text)
    return _TOKEN.findall(text.casefold().translate(_ALIKE))


def contained(held_out: Sequence[Prompt], train: Sequence[Prompt], ngram: int) -> list[tuple[float, int]]:
    """Return for each held-out question the largest containment in a training question, and that one's place.

    The containment of h in t is |S(h) & S(t)| / |S(h)|, with S the set of runs of n tokens (words, numbers and signs):
    n is `ngram`, or the number of tokens of h if that is less. Source: Broder (1997), "On the resemblance and
    containment of documents".
    """
    questions = [tokens(prompt.text) for prompt in held_out]
    source = [tokens(prompt.text) for prompt in train]
    found = [(0.0, 0)] * len(questions)
    by_width: dict[int, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        by_width[min(ngram, len(question))].append(place)
    for width, places in by_width.items():
        if width == 0:
            continue
        runs = [_runs(questions[place], width) for place in places]
        wanted = {run for question in runs for run in question}
        holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, text in enumerate(source):
            for run in _runs(text, width) & wanted:
                holders[run].append(number)
        for place, asked in zip(places, runs, strict=True):
            counts = Counter(number for run in asked for number in holders[run])
            if counts:
                number, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
                found[place] = (count / len(asked), number)
    return found


def _runs(words: Sequence[str], width: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[start:] for start in range(width)), strict=False))


def options(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the options of `data check` off the words; the others are those of `fit`."""
    from argparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m lightning_rlvr data check",
        description="Check the questions of a config without loading a model. All options of fit are taken as well: "
        "--config FILE, --data.max_prompt_tokens 400. Exit status: 0 if training can start (perhaps with warnings), "
        "1 if it would be wrong, 2 if the config is.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, help="folder for data_check.json and data_check.md; none by default")
    parser.add_argument("--ngram", type=int, default=13, help="words in a row that are compared (default: 13)")
    parser.add_argument("--containment", type=float, default=0.8, help="share of them that is reported (default: 0.8)")
    known, rest = parser.parse_known_args(list(words))
    return vars(known), rest
