"""Questions from the procedural data sets of reasoning_gym (arXiv 2505.24760)."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import numpy as np

from lightning_rlvr.tasks.prompts import drop_repeats
from lightning_rlvr.tasks.template import Template
from lightning_rlvr.types import Prompt, Task, UserError

# Their items depend on the size of the whole set (it is shuffled at once), so ranges of two sizes would mix.
_SHUFFLED_WHOLE = frozenset({"acre"})

# Their items follow the iteration order of sets of strings, which Python draws anew for every process.
# Measured on 0.1.25: items 3 to 42 of seed 1 under two hash seeds.
_HASH_ORDERED = frozenset(
    {
        "codeio",
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)


@dataclass(frozen=True)
class ReasoningGym(Task):
    """Items [start, start + size) of the data set `name` with one `seed`.

    Split training from validation by index range under one seed. Neighbouring seeds overlap in most data
    sets (seed 42 item 1 is seed 43 item 0), so two seeds are no split.

    Args:
        name: data set, such as "chain_sum".
        size: number of items.
        start: index of the first item.
        seed: of the data set, >= 0.
        config: further settings of the data set, such as {min_terms: 2}. `size` in it is the size of the
            whole set that the index range is cut from; the set "acre" needs it.
        prompt_template: text with {question} and any key of the item's metadata, such as "{expression} =".
        unique: drop items whose prompt text occurred before in the range; fewer than `size` may remain.

    Each prompt's metadata holds "source_dataset", "entry" ({question, answer, metadata}) and "config" for the
    scorer.
    Data sets whose answers only a scorer can judge give answer "". The uid is "name:seed:index", with a
    digest of `config` after the seed if there is one.
    """

    name: str
    size: int
    start: int = 0
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    prompt_template: str = "{question}"
    unique: bool = False

    def __post_init__(self) -> None:
        for key, value, least in (("size", self.size, 1), ("start", self.start, 0), ("seed", self.seed, 0)):
            if value < least:
                raise UserError(
                    f"{key} must be >= {least}, got {value}: it belongs to the index range "
                    f"[start, start + size) of {self.name!r}. Set the task's {key}."
                )
        if "seed" in self.config:
            raise UserError(
                f"config must not hold a seed, got {self.config['seed']!r}: the task has one. Set the task's seed."
            )
        Template.parse(self.prompt_template)

    def load(self) -> list[Prompt]:
        """Generate the items. Equal arguments give equal prompts, in any process.

        Raises: UserError for an unknown data set or setting, for a set whose items follow Python's hash
        seed if that is not fixed, for a range beyond the whole set, for an item that the data set cannot
        generate, and for a template name that an item does not have.
        """
        dataset = self._dataset()
        template = Template.parse(self.prompt_template)
        prefix = self._uid_prefix()
        indices = range(self.start, self.start + self.size)
        prompts = [self._prompt(self._entry(dataset, i), template, f"{prefix}:{i}") for i in indices]
        return drop_repeats(prompts) if self.unique else prompts

    def _dataset(self) -> Any:
        from reasoning_gym import create_dataset

        self._check_names()
        self._check_hash_seed()
        whole = self._whole_size()
        try:
            return create_dataset(self.name, **{**self.config, "seed": self.seed, "size": whole})
        except Exception as error:
            raise UserError(
                f"config must suit the data set {self.name!r}, got {self.config}: {_reason(error)}. "
                "Change the task's config."
            ) from error

    def _check_names(self) -> None:
        from reasoning_gym.factory import DATASETS

        if self.name not in DATASETS:
            close = get_close_matches(self.name, DATASETS, n=3) or sorted(DATASETS)
            raise UserError(
                f"name must be a data set of reasoning_gym, got {self.name!r}: did you mean "
                f"{' or '.join(close[:3])}? Set the task's name."
            )
        known = [f.name for f in fields(DATASETS[self.name][1])]
        for key in self.config:
            if key not in known:
                raise UserError(
                    f"config must hold settings of {self.name!r}, got {key!r}: it knows "
                    f"{', '.join(k for k in known if k != 'seed')}. Change the task's config."
                )

    def _check_hash_seed(self) -> None:
        if self.name in _HASH_ORDERED and os.environ.get("PYTHONHASHSEED", "random") in ("", "random"):
            raise UserError(
                f"PYTHONHASHSEED must be fixed for {self.name!r}: its items follow Python's hash seed, so each "
                "process (a rank, a resumed run) would have other questions under the same uids. Run with "
                "PYTHONHASHSEED=0 in the environment, or set the task's name to another data set."
            )

    def _whole_size(self) -> int:
        stop = self.start + self.size
        if "size" not in self.config and self.name in _SHUFFLED_WHOLE:
            raise UserError(
                f"config.size must be given for {self.name!r}: it shuffles the whole set, so the same index "
                "is another item in a set of another size. Set the task's config.size, the same for "
                "training and validation."
            )
        whole = self.config.get("size", stop)
        if not isinstance(whole, int) or whole < stop:
            raise UserError(
                f"config.size must be a whole number >= start + size = {stop}, got {whole!r}: the index "
                "range is cut from it. Set the task's config.size, start or size."
            )
        return whole

    def _entry(self, dataset: Any, index: int) -> dict[str, Any]:
        try:
            with _global_random(f"{self.seed}:{index}"):
                entry: dict[str, Any] = dataset[index]
                return entry
        except Exception as error:
            raise UserError(
                f"{self.name!r} must be able to generate item {index}, but: {_reason(error)}. "
                "Change the task's config, start or size."
            ) from error

    def _prompt(self, entry: Mapping[str, Any], template: Template, uid: str) -> Prompt:
        details = entry["metadata"]
        answer = entry["answer"]
        source = details.get("source_dataset", self.name)
        return Prompt(
            uid=uid,
            text=template.render({**details, "question": entry["question"]}),
            answer="" if answer is None else str(answer),
            metadata={"source_dataset": source, "entry": dict(entry), "config": dict(self.config)},
        )

    def _uid_prefix(self) -> str:
        if not self.config:
            return f"{self.name}:{self.seed}"
        text = json.dumps(self.config, sort_keys=True, default=str)
        return f"{self.name}:{self.seed}:{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@contextmanager
def _global_random(seed: str) -> Iterator[None]:
    """Seed Python's global generator for a while, and give it and numpy's back as they were.

    list_functions draws from the one and pool_matrix reseeds the other.
    """
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _reason(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    return text.splitlines()[0] if text else type(error).__name__
