"""An experiment file: a base config, variants of it, and seeds. Every combination is one run of `fit`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_rlvr.types import UserError

KEYS = ("base", "overrides", "variants", "seeds")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
Resolve = Callable[[Sequence[str]], dict[str, Any]]  # arguments of `fit` -> its resolved config


@dataclass(frozen=True)
class Run:
    """One run of `fit`: what it is given, and its folder OUTPUT/VARIANT/seed-N."""

    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of `fit`, beside run_dir

    @property
    def name(self) -> str:
        """VARIANT/seed-N."""
        return f"{self.variant}/{self.folder.name}"


@dataclass(frozen=True)
class Experiment:
    """The contents of an experiment file.

    Args:
        base: configs that every run is given, one on top of the other.
        overrides: what every run changes in them, by dotted key.
        variants: by name, what sets its runs apart: dotted keys, and under `config` further configs to put on top.
        seeds: each variant is run with each of them as seed_everything.
        folder: of the experiment file; configs are named relative to it.
    """

    base: tuple[Path, ...]
    overrides: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    folder: Path

    def runs(self, output: Path) -> list[Run]:
        """Return all runs, variant by variant: those beside each other differ in their seed and so share no cache."""
        return [
            Run(name, seed, output / name / f"seed-{seed}", (*self.arguments(name), f"--seed_everything={seed}"))
            for name in self.variants
            for seed in self.seeds
        ]

    def arguments(self, variant: str) -> tuple[str, ...]:
        """Return the arguments of `fit` for a variant: configs, then what all runs change, then what it changes."""
        own = dict(self.variants[variant])
        configs = [*self.base, *_paths(own.pop("config", []), self.folder, f"variants.{variant}.config")]
        values = {**self.overrides, **own}
        return (
            *(f"--config={_shown(path)}" for path in configs),
            *(f"--{key}={_text(value)}" for key, value in values.items()),
        )

    def files(self) -> list[Path]:
        """Return every config that a run reads."""
        own = [_paths(v.get("config", []), self.folder, f"variants.{n}.config") for n, v in self.variants.items()]
        return list(dict.fromkeys([*self.base, *(path for paths in own for path in paths)]))


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file; that its configs and keys mean something to `fit` is `check`'s to say.

    Raises: UserError.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path} as an experiment: {error}. Name a YAML file.") from error
    if not isinstance(data, dict) or set(data) - set(KEYS) or not {"base", "variants", "seeds"} <= set(data):
        found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise UserError(f"an experiment must have the keys base, variants and seeds, and may have overrides: {path} "
                        f"has {found}.")  # fmt: skip
    return Experiment(
        base=tuple(_paths(data["base"], path.parent, "base")),
        overrides=_overrides(data.get("overrides") or {}, "overrides"),
        variants=_variants(data["variants"]),
        seeds=_seeds(data["seeds"]),
        folder=path.parent,
    )


def check(experiment: Experiment, resolve: Resolve) -> None:
    """Have each variant's config resolved with the first seed. Raises: UserError that names the variant."""
    for name in experiment.variants:
        try:
            resolve([*experiment.arguments(name), f"--seed_everything={experiment.seeds[0]}"])
        except UserError as error:
            raise UserError(f"variants.{name}: {error}") from error


def _variants(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"variants must be a mapping of names to overrides, got {value!r}. Set variants.")
    for name in value:
        if not NAME.fullmatch(str(name)):
            raise UserError(
                f"a variant's name must be of letters, digits and ._+-, with one of the former first, got {name!r}: it "
                "names a folder. Set variants."
            )
    return {str(name): _overrides(own or {}, f"variants.{name}") for name, own in value.items()}


def _overrides(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{key} must be a mapping of dotted keys to values, got {value!r}. Set {key}.")
    for name in ("run_dir", "seed_everything", "ckpt_path"):
        if name in value:
            raise UserError(f"{key} must leave {name} alone: each run of a sweep has its own. Set seeds, or --output.")
    return value


def _seeds(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or not value or len(set(value)) < len(value):
        raise UserError(f"seeds must be a list of different whole numbers from 0 on, got {value!r}. Set seeds.")
    return tuple(value)


def _paths(value: Any, folder: Path, key: str) -> list[Path]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{key} must be a config or a list of configs, got {value!r}. Set {key}.")
    paths = [(folder / name).resolve() for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise UserError(f"{key} must name configs relative to the experiment's folder, got {name}: there is no "
                            f"{path}. Set {key}.")  # fmt: skip
    return paths


def _text(value: Any) -> str:
    """Return a value as the command line takes it: text as it is, all else as JSON, which is YAML too."""
    return value if isinstance(value, str) else json.dumps(value)


def _shown(path: Path) -> str:
    """Return a path relative to where we are, if it is below."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
