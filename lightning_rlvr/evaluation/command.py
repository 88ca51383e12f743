"""`python -m lightning_rlvr evaluate`: models on benchmarks, resumable, each step from the files of the one before."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from lightning_rlvr.evaluation.benchmark import Benchmark, Unjudgeable, check_names, read_benchmarks
from lightning_rlvr.evaluation.judge import judge, judging_manifest
from lightning_rlvr.evaluation.measure import Bootstrap, Result, chosen_ks, measure
from lightning_rlvr.evaluation.policies import policy_source
from lightning_rlvr.evaluation.report import RESULTS, Report, write_report
from lightning_rlvr.evaluation.sample import Generation, sample, texts_digest
from lightning_rlvr.models import PolicySource, PromptFormat
from lightning_rlvr.models.pretrained import file_digest
from lightning_rlvr.rewards.identity import shown
from lightning_rlvr.rollout import Served
from lightning_rlvr.store import Store, read_manifest, read_records
from lightning_rlvr.types import Prompt, Sampling, UserError

CONFIG = "config.yaml"
COLUMNS = (["uid", "tokens", "entropy", "truncated"], ["status", "cluster"])  # of samples and verdicts, for measuring


@dataclass(frozen=True)
class Folder:
    """Where everything of an evaluation lies."""

    root: Path

    def samples(self, model: str, benchmark: str) -> Path:
        """The responses of a model to a benchmark."""
        return self._file("samples", model, benchmark)

    def verdicts(self, model: str, benchmark: str) -> Path:
        """The verdicts on them."""
        return self._file("verdicts", model, benchmark)

    def _file(self, kind: str, model: str, benchmark: str) -> Path:
        return self.root / kind / quote(model, safe=" ") / f"{quote(benchmark, safe=' ')}.parquet"


def evaluate(
    output: Path,
    models: dict[str, PolicySource | Served | str] | None = None,
    benchmarks: list[str] | None = None,
    unjudgeable: Unjudgeable = "error",
    samples: int = 32,
    sampling: Sampling = Sampling(max_new_tokens=8000),  # noqa: B008 - frozen
    prompt_format: PromptFormat = PromptFormat(),  # noqa: B008 - frozen
    ks: list[int] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 1,
    prompts_per_batch: int = 8,
    rollout_rows: int = 256,
    device: str | None = None,
) -> Report:
    """Evaluate models on benchmarks: pass@k, avg@n and maj@k with bootstrap intervals, and how the responses were.

    In the output folder: samples/MODEL/BENCHMARK.parquet (all responses), verdicts/ (the same for what the rewards
    said), results.json, table.md, table.csv, table.png, and config.yaml with these settings. The same command continues
    what was interrupted. With neither models nor benchmarks, a finished folder is measured anew; with benchmarks alone,
    its responses to these are first judged anew where reward or gold answers have changed. Two or more models are
    compared with the first, problem by problem.

    Args:
        output: folder of the evaluation.
        models: by name: a policy source, a server (lightning_rlvr.rollout.Served), or a folder in Hugging Face format,
            a run's folder, a checkpoint, a hub name.
        benchmarks: YAML files with `name`, `task` and `reward`; configs/benchmarks holds some.
        unjudgeable: whether a problem that the reward cannot judge (an unparsable gold answer) is an error or is
            dropped, counted.
        samples: responses to each problem (n).
        sampling: of responses.
        prompt_format: how a question becomes a prompt.
        ks: the k of pass@k and maj@k, at most `samples`; by default those of 8, 16 and 32.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: names all randomness.
        prompts_per_batch: problems sampled at a time, and lost at most by a kill.
        rollout_rows: responses decoded at a time; changes memory and speed only.
        device: where models run, such as cuda:1; by default a GPU if there is one.
    """
    folder = Folder(output)
    generation = Generation(samples, sampling, prompt_format, seed, prompts_per_batch, rollout_rows, device)
    bootstrap = Bootstrap(level, resamples, seed)
    if models is not None and benchmarks is None:
        raise UserError("models need benchmarks to be evaluated on. Set benchmarks, or leave out models too.")
    suite = None if benchmarks is None else read_benchmarks(benchmarks)
    try:
        questions = {b.name: b.questions(unjudgeable) for b in suite or []}
        if models is not None:
            chosen_ks(ks, samples)  # sooner than after hours of sampling
            for benchmark in suite or []:
                shown(benchmark.reward, f"the reward of benchmark {benchmark.name!r}")
            _sample(_named(models), questions, folder, generation)
        names = list(models) if models is not None else _finished(folder)[0]
        for benchmark in suite or []:
            for name in names:
                _judge(name, benchmark, questions[benchmark.name], folder)
    finally:
        for benchmark in suite or []:
            benchmark.reward.close()
    measured_on = list(dict.fromkeys([*(_finished(folder)[1] if models is None else []), *questions]))
    report = _measure(names, measured_on, folder, ks, bootstrap)
    write_report(report, output)
    return report


def _named(models: Mapping[str, PolicySource | Served | str]) -> dict[str, PolicySource | Served]:
    check_names(list(models), "models")
    return {name: policy_source(model) for name, model in models.items()}


def _sample(
    models: Mapping[str, PolicySource | Served],
    questions: Mapping[str, Sequence[Prompt]],
    folder: Folder,
    generation: Generation,
) -> None:
    """Check that everything fits before any work is done, then sample model by model."""
    generation.chosen_device()
    plans = {}
    for name, source in models.items():
        try:
            generation.prompt_format.encode(source.tokenizer(), "?")
            plans[name] = {
                b: (asked, Store(folder.samples(name, b), generation.manifest(source, asked)))
                for b, asked in questions.items()
            }
        except UserError as error:
            raise UserError(f"model {name!r}: {error}") from error
        for _, store in plans[name].values():
            store.check()
    for name, source in models.items():
        sample(name, source, plans[name], generation)


def _judge(model: str, benchmark: Benchmark, questions: Sequence[Prompt], folder: Folder) -> None:
    """Judge what a model answered, if that was to these questions."""
    path = folder.samples(model, benchmark.name)
    if not path.is_file():
        raise UserError(
            f"models must be sampled on benchmark {benchmark.name!r} before it is judged, but there is no {path}. "
            "Set models as well, or benchmarks."
        )
    sampled = read_manifest(path)
    if sampled["texts"] != texts_digest(questions):
        raise UserError(
            f"{path} must hold responses to the questions of benchmark {benchmark.name!r}, but was sampled on "
            f"{sampled['questions']} others; the benchmark has {len(questions)}. Set benchmarks, or output."
        )
    store = Store(folder.verdicts(model, benchmark.name), judging_manifest(benchmark.reward, questions, path))
    judge(f"{model}: {benchmark.name}", benchmark.reward, questions, read_records(path, sampled), store)


def _measure(
    models: Sequence[str], benchmarks: Sequence[str], folder: Folder, ks: Sequence[int] | None, bootstrap: Bootstrap
) -> Report:
    """Measure from the files alone."""
    results: dict[str, dict[str, Result]] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for model in models:
        results[model] = {}
        for benchmark in benchmarks:
            paths = folder.samples(model, benchmark), folder.verdicts(model, benchmark)
            if not paths[1].is_file():
                raise UserError(
                    f"{paths[1]} must be there to be measured, but is not. Set benchmarks, so that it is made."
                )
            sampled, judged = (read_manifest(path) for path in paths)
            if judged["responses"] != file_digest(paths[0]):
                raise UserError(
                    f"{paths[1]} must be of the responses in {paths[0]}, but those have changed since. Set benchmarks, "
                    "so that they are judged anew."
                )
            samples, verdicts = (pd.read_parquet(p, columns=columns) for p, columns in zip(paths, COLUMNS, strict=True))
            results[model][benchmark] = measure(samples, verdicts, chosen_ks(ks, sampled["samples"]))
            manifests.setdefault(model, {})[benchmark] = {"samples": sampled, "verdicts": judged}
    counts = {(model, name): own["samples"]["samples"] for model, of in manifests.items() for name, own in of.items()}
    if len(set(counts.values())) > 1:
        raise UserError(
            f"all models and benchmarks must have as many samples a problem to stand in one table, got {counts}. Set "
            "benchmarks, or models, samples and output."
        )
    return Report.make(results, bootstrap, manifests)


def _finished(folder: Folder) -> tuple[list[str], list[str]]:
    """Return the models and benchmarks of a finished evaluation, in their order."""
    file = folder.root / RESULTS
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return list(stored["models"]), list(stored["benchmarks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output must be the folder of a finished evaluation, got {folder.root}: {file.name} cannot be read "
            f"({type(error).__name__}). Set models and benchmarks, or output."
        ) from error


def command_line() -> ArgumentParser:
    """Return the parser of `python -m lightning_rlvr evaluate`."""
    parser = ArgumentParser(prog="python -m lightning_rlvr evaluate", exit_on_error=False, allow_abbrev=False)
    parser.description = (evaluate.__doc__ or "").partition("Args:")[0].rstrip() + (
        " What is left out is as below; with neither models nor --config, it is as in the folder's config.yaml."
    )
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with any of the keys below.")
    parser.add_function_arguments(evaluate, as_positional=False)
    return parser


def main(args: list[str]) -> None:
    """`python -m lightning_rlvr evaluate`: arguments or a YAML file (--config), printed as tables."""
    parser = command_line()
    try:
        config = parser.parse_args([*_stored(args), *args])
    except ArgumentError as error:
        raise UserError(f"{error}\nSee {parser.prog} --help.") from error
    settings = parser.instantiate_classes(config)
    settings.pop("config")
    report = evaluate(**settings)
    if config.models is not None:
        parser.save(config, config.output / CONFIG, overwrite=True, skip_none=False)
    sys.stdout.write(report.markdown())


def _stored(args: Sequence[str]) -> list[str]:
    """Return as arguments the settings of the folder to be measured anew, where neither config nor models are given."""
    words = [word for arg in args for word in arg.split("=", 1)]
    given = {word.partition(".")[0] for word in words}
    if given & {"--config", "--models"} or "--output" not in words[:-1]:
        return []
    file = Path(words[words.index("--output") + 1]) / CONFIG
    if not file.is_file():
        return []
    import yaml

    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in ("config", "models", "benchmarks")}
    return ["--config", json.dumps(kept)]
