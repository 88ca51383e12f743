"""Questions from rows with named columns: what local files and Hugging Face data sets share."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlvr.tasks.prompts import drop_repeats
from lightning_rlvr.tasks.template import Template
from lightning_rlvr.types import Prompt, Task, UserError

Record = Mapping[str, Any]
ALTERNATIVES = "alternatives"  # metadata: further right answers
EXACT_FLOAT = 2**53  # whole numbers below have a float of their own


@dataclass(frozen=True, kw_only=True)
class Records(Task):
    """Rows with a question column and an answer column. Rows count from 0 in the whole source.

    Args:
        question_column: column of the question. A path reaches into nested columns: "prompt.0.content".
        answer_column: column of the gold answer, or a path: "reward_model.ground_truth". A list holds
            alternatives, any of which is right: the first is the prompt's answer, the others are in its
            metadata under "alternatives". A whole number in floating point, 142.0, is written 142.
        solution_column: column to read the answer from where the answer column is empty.
        answer_pattern: regular expression; group 1 of its last match in the answer column (in the solution
            column if there is one) is the gold answer. "#### (.+)$" suits GSM8K. Empty takes the whole column.
        prompt_template: text with {question} (the question column) and any other column, by name; a list of texts
            stands one on a line.
        rows: [start, stop] keeps the rows start <= row < stop; stop may be null for "to the end".
        uid_column: column that names each row; empty for the source's name and the row.
        unique: drop rows whose prompt text occurred before.

    Each prompt's metadata is its row, "alternatives" apart.

    Texts are `str`, never `str | None`: jsonargparse reads a value of the latter as YAML, where
    "#### (.+)$" is a comment and would arrive as None.
    """

    question_column: str = "question"
    answer_column: str = "answer"
    solution_column: str = ""
    answer_pattern: str = ""
    prompt_template: str = "{question}"
    rows: tuple[int, int | None] | None = None
    uid_column: str = ""
    unique: bool = False

    def __post_init__(self) -> None:
        for key in ("answer_pattern", "solution_column", "uid_column"):
            if getattr(self, key) is None:
                raise UserError(
                    f"{key} must be text, got null: what starts with # is a YAML comment, also on the command "
                    f"line. Write the first # of the task's {key} as [#], or leave {key} out."
                )
        Template.parse(self.prompt_template)
        if self.answer_pattern:
            _compile(self.answer_pattern)
        start, stop = self.rows or (0, None)
        if start < 0 or (stop is not None and stop <= start):
            raise UserError(
                f"rows must be [start, stop] with 0 <= start < stop, got {list(self.rows or ())}: it keeps "
                "the rows start <= row < stop. Set the task's rows."
            )

    @abstractmethod
    def source(self) -> tuple[str, str]:
        """Return how messages call the source and how uids do."""

    @abstractmethod
    def read(self) -> Sequence[Record]:
        """Return all rows in order. Raises UserError that names the key to change."""

    def load(self) -> list[Prompt]:
        """Return the rows as prompts.

        Raises: UserError if the source cannot be read, holds no rows or too few for `rows`, lacks a column,
        or if a row has no question, no answer, an answer unlike `answer_pattern`, or the uid of another.
        """
        records = self.read()
        template = Template.parse(self.prompt_template)
        prompts = [self._prompt(row, records[row], template) for row in self._range(len(records))]
        self._check_uids(prompts)
        return drop_repeats(prompts) if self.unique else prompts

    def _range(self, count: int) -> range:
        where, _ = self.source()
        if count == 0:
            raise UserError(
                f"{where} must hold at least one row, got none: there is nothing to sample for. "
                "Set the task's path or name."
            )
        start, stop = self.rows or (0, None)
        if start >= count or (stop or 0) > count:
            raise UserError(
                f"rows must lie within {where}, got [{start}, {stop}]: it has {count} rows. Set the task's rows."
            )
        return range(start, count if stop is None else stop)

    def _prompt(self, row: int, record: Record, template: Template) -> Prompt:
        where, stem = self.source()
        at = f"row {row} of {where}"
        question = _text(record, self.question_column, "question_column", at)
        values = {name: _lines(value) for name, value in {**record, "question": question}.items()}
        for name in template.names:
            value = values.get(name, "")
            if value is None or (isinstance(value, float) and math.isnan(value)):
                raise UserError(
                    f"prompt_template must use filled columns, but {name!r} is empty in {at}. "
                    "Change the task's prompt_template or rows."
                )
        uid = _text(record, self.uid_column, "uid_column", at) if self.uid_column else f"{stem}:{row}"
        gold, *others = self._golds(record, at)
        # a column of that name is something else: wrong choices, say
        metadata = {**record, ALTERNATIVES: others} if others or ALTERNATIVES in record else record
        return Prompt(uid=uid, text=template.render(values), answer=gold, metadata=metadata)

    def _golds(self, record: Record, at: str) -> list[str]:
        """Return the gold answer and its alternatives, each once."""
        value = _lookup(record, self.answer_column, "answer_column", at)
        if self.solution_column and _is_empty(value):
            return [self._extract(_text(record, self.solution_column, "solution_column", at), at)]
        found = [
            _as_text(item, self.answer_column, "answer_column", at).strip()
            for item in (value if isinstance(value, list) and value else [value])
        ]
        golds = found if self.solution_column else [self._extract(answer, at) for answer in found]
        return list(dict.fromkeys(golds))

    def _extract(self, answer: str, at: str) -> str:
        """Return what the pattern finds in the text of an answer or a solution."""
        if not self.answer_pattern:
            return answer.strip()
        golds = [match.group(1) for match in _compile(self.answer_pattern).finditer(answer)]
        if not golds or not (golds[-1] or "").strip():
            raise UserError(
                f"answer_pattern {self.answer_pattern!r} must find an answer in {at}, got {_short(answer)}. "
                "Set the task's answer_pattern or answer_column."
            )
        gold: str = golds[-1]
        return gold.strip()

    def _check_uids(self, prompts: Sequence[Prompt]) -> None:
        seen: set[str] = set()
        for prompt in prompts:
            if prompt.uid in seen:
                raise UserError(
                    f"uid_column {self.uid_column!r} must differ from row to row, got {prompt.uid!r} twice in "
                    f"{self.source()[0]}: results are stored by uid. Set the task's uid_column, or leave it "
                    "out to number the rows."
                )
            seen.add(prompt.uid)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"answer_pattern must be a regular expression, got {pattern!r}: {error}. Set the task's answer_pattern."
        ) from error
    if compiled.groups < 1:
        raise UserError(
            f"answer_pattern must hold a group (...), got {pattern!r}: group 1 is the gold answer. "
            "Set the task's answer_pattern."
        )
    return compiled


def _text(record: Record, column: str, key: str, at: str) -> str:
    return _as_text(_lookup(record, column, key, at), column, key, at)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or value == [] or (isinstance(value, str) and not value.strip())


def _as_text(value: Any, column: str, key: str, at: str) -> str:
    if isinstance(value, (list, dict)) and value != []:
        inner = next(iter(value), "name") if isinstance(value, dict) else 0
        raise UserError(
            f"{key} must lead to a text or a number, got a {type(value).__name__} in {column!r} of {at}. "
            f"Set the task's {key} to a path such as {column + '.' + str(inner)!r}."
        )
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOAT:
        value = int(value)
    text = "" if _is_empty(value) else str(value)
    if not text:
        raise UserError(f"{key} {column!r} must not be empty, but it is in {at}. Set the task's {key} or rows.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key} {column!r} must hold valid Unicode, but {at} holds half a surrogate pair: no tokenizer "
            f"takes it. Repair the row, or set the task's {key} or rows."
        ) from error
    return text


def _lookup(record: Record, column: str, key: str, at: str) -> Any:
    """Return a column, or what a dotted path leads to; a column of that very name goes first."""
    if column in record:
        return record[column]
    value: Any = record
    for step in column.split("."):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{key} must name a column, got {column!r}: {at} has {', '.join(map(str, record)) or 'none'}. "
                f"Set the task's {key}."
            ) from error
    return value


def _lines(value: Any) -> Any:
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return "\n".join(value) if texts else value


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else "..." + text[-limit:])
