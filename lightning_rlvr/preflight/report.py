"""`python -m lightning_rlvr preflight`: what a config takes, without weights, GPUs or a run."""

from __future__ import annotations

import json
import os
import statistics
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lightning_rlvr.curriculum.sampler import check_batch_size
from lightning_rlvr.models.forward import joins
from lightning_rlvr.preflight.memory import Memory, Work, estimate, trained_bytes
from lightning_rlvr.preflight.placement import Placement, placement
from lightning_rlvr.rollout import VLLM
from lightning_rlvr.training import RLVRDataModule, RLVRModule
from lightning_rlvr.types import Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
SAMPLE = 1_000  # questions whose prompts are measured
CONTEXT = GIB  # assumed of a GPU's memory beside tensors: CUDA, its libraries, communication, fragments


@dataclass(frozen=True)
class Report:
    """What was found out; `facts` by group, as they are written."""

    facts: dict[str, dict[str, Any]]
    memory: Memory
    room: int  # bytes
    place: Placement
    refused: str | None = None  # what `fit` would say of the lengths

    @property
    def needed(self) -> int:
        """The bytes that a process needs at its peak, with what no tensor holds."""
        return self.memory.peak + (CONTEXT if self.place.accelerator else 0)

    @property
    def fits(self) -> bool:
        """Whether the room is enough: of a GPU for one process, of a machine's memory for all."""
        return self.needed * (1 if self.place.accelerator else self.place.world) <= self.room

    @property
    def exit_status(self) -> int:
        """0 if it fits and `fit` would take it, else 1."""
        return int(not self.fits or self.refused is not None)

    def write(self, path: Path) -> None:
        """Write all as JSON; bytes are whole numbers. Raises: UserError if that cannot be."""
        memory = {**asdict(self.memory), "totals": self.memory.totals, "peak": self.memory.peak}
        found = {"room": self.room, "needed": self.needed, "fits": self.fits, "refused": self.refused}
        contents = {**self.facts, "memory": memory, **found}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output must be a file that can be written, got {path}: {error}. Set --output.") from error

    def show(self) -> None:
        """Print it."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        for group, facts in self.facts.items():
            table = Table(title=group, title_justify="left", show_header=False)
            for name, value in facts.items():
                table.add_row(name, _shown(name, value))
            console.print(table)
        table = Table("at the same time, GiB", "", "total", title="memory of a process", title_justify="left")
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.parts.items() if size)
        table.add_row("always", parts, f"{sum(self.memory.parts.values()) / GIB:.2f}")
        for moment, sizes in self.memory.moments.items():
            detail = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
            table.add_row(f"+ {moment}", detail, f"{self.memory.totals[moment] / GIB:.2f}")
        console.print(table)
        beside = f", {CONTEXT / GIB:.0f} GiB beside tensors included," if self.place.accelerator else ""
        console.print(
            f"{'It fits' if self.fits else 'It does not fit'}: {self.needed / GIB:.1f} GiB a process{beside} of "
            f"{self.room / GIB:.1f} GiB{'' if self.place.accelerator else ' for all'}.",
            style="green" if self.fits else "red",
        )
        if self.refused is not None:
            console.print(f"fit would refuse it: {self.refused}", style="red", markup=False)


def inspect(
    data: RLVRDataModule, module: RLVRModule, settings: Mapping[str, Any], gpu_memory: float | None = None
) -> Report:
    """Return what `fit` with a config takes.

    Memory is that of the longest prompts (of a sample of the questions; max_prompt_tokens if they cannot be read) and
    of responses that all reach their limit. Validation is counted where there is a `val`.

    Args:
        data: the data module of the config.
        module: its module; no weights are loaded.
        settings: the resolved config, of which trainer and checkpoint are read.
        gpu_memory: GiB of each GPU; None is this machine's GPU, or else its memory.

    Raises: UserError if the model's config, the strategy or the precision is not to be had.
    """
    if gpu_memory is not None and not gpu_memory > 0:
        raise UserError(f"gpu_memory must be a positive number of GiB, got {gpu_memory}. Set --gpu_memory.")
    place = placement(settings["trainer"], gpu_memory is not None or torch.cuda.is_available())
    model = module.policy_source.skeleton()
    if place.dtype is not None:
        cast(Any, model).to(place.dtype)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prompts = _prompts(data, module)
    work = _work(data, module, place, int(prompts.get("longest kept", data.max_prompt_tokens)))
    reference = module.objective.needs_reference
    memory = estimate(model, work, place, module._optimizer, reference, module.offload_reference)
    room = _room(place, gpu_memory)
    if module.vllm is not None:
        memory = _with_vllm(memory, module.vllm, room if place.accelerator else None)
    rows = data.prompts_per_batch * data.group_size
    weights = sum(parameter.nbytes for parameter in model.parameters())
    state = memory.parts["optimizer"] * place.optimizer if place.optimizer <= place.world else 12 * trained
    kept = trained_bytes(model) + state
    inert = module.objective.inert(module.updates_per_rollout)
    facts: dict[str, dict[str, Any]] = {
        "model": {
            "class": type(model).__name__,
            "parameters": parameters,
            "trained": trained,
            "weights bytes": weights,
        },
        "step": {
            "processes": place.world,
            "prompts a process": work.prompts,
            "responses": rows,
            "updates a rollout": work.updates,
            "micro-batches an update": work.largest_part(place.joined or joins(model))[2],
            "tokens at most": rows * work.response_tokens + data.prompts_per_batch * work.prompt_tokens,
        },
        "terms that cannot act": {str(i): reason for i, reason in enumerate(inert, 1)} or {"none": ""},
        "prompts": prompts,
        "disk": _disk(settings.get("checkpoint") or {}, kept, weights),
    }
    return Report(facts, memory, room, place, _refused(data, module, model, prompts))


def _disk(keeps: Mapping[str, Any], checkpoint: int, export: int) -> dict[str, Any]:
    """Count checkpoints while the last is written: last.ckpt, the one before it where there is one, and the best."""
    best = int(keeps.get("save_top_k", 1))
    facts: dict[str, Any] = {"a checkpoint bytes": checkpoint, "export bytes": export}
    if best < 0:
        return {**facts, "checkpoints at most": "no bound: checkpoint.save_top_k is -1"}
    count = best + (2 if keeps.get("save_last") else 1) + 1
    return {**facts, "checkpoints at most": count, "all bytes": checkpoint * count + export}


def _work(data: RLVRDataModule, module: RLVRModule, place: Placement, prompt_tokens: int) -> Work:
    check_batch_size(data.prompts_per_batch, place.world)
    mine = data.prompts_per_batch // place.world
    return Work(
        prompts=mine,
        samples=data.group_size,
        prompt_tokens=prompt_tokens,
        response_tokens=module.sampling.max_new_tokens,
        updates=min(module.updates_per_rollout, mine),
        micro_batch_size=module.micro_batch_size,
        rollout_rows=module.rollout_rows,
        eval_prompts=data.eval_prompts_per_batch if data.tasks["val"] is not None else 0,
        eval_samples=data.eval_samples,
        eval_tokens=module.eval_sampling.max_new_tokens,
        with_entropy=module.objective.needs_entropy,
        recompute=module.recompute_logp is not False,
        temperature=module.sampling.temperature,
    )


def _prompts(data: RLVRDataModule, module: RLVRModule) -> dict[str, Any]:
    """Measure the prompts of evenly spaced training questions; the length of responses is not known beforehand."""
    limit = data.max_prompt_tokens
    task = data.tasks["train"]
    if task is None:
        return {"not read": "there is no data.train"}
    try:
        questions = task.load()
    except UserError as error:
        return {"not read": str(error), "assumed tokens": limit}
    lengths = _lengths(questions, module)
    return {
        "questions": len(questions),
        "measured": len(lengths),
        "median tokens": int(statistics.median(lengths)),
        "longest tokens": max(lengths),
        "longest kept": max((length for length in lengths if length <= limit), default=limit),
        f"share over max_prompt_tokens ({limit})": sum(length > limit for length in lengths) / len(lengths),
        "responses are cut at tokens": module.sampling.max_new_tokens,
    }


def _lengths(questions: Sequence[Prompt], module: RLVRModule) -> list[int]:
    """Return the tokens of the prompts of evenly spaced questions."""
    tokenizer = module.policy_source.tokenizer()
    sample = questions[:: max(1, -(-len(questions) // SAMPLE))]
    return [len(module.prompt_format.encode(tokenizer, question.text)) for question in sample]


def _refused(
    data: RLVRDataModule, module: RLVRModule, model: PreTrainedModel, prompts: Mapping[str, Any]
) -> str | None:
    """Return why `fit` would refuse the lengths of prompts and responses; None if not, or if they cannot be read."""
    if "longest kept" in prompts:
        data.longest["train"] = prompts["longest kept"]
    if data.tasks["val"] is not None:
        with suppress(UserError):  # as it is said of the training questions
            lengths = _lengths(data.tasks["val"].load(), module)
            data.longest["val"] = max((length for length in lengths if length <= data.max_prompt_tokens), default=0)
    try:
        for split in data.longest:
            data.check_length(split, module, model)
    except UserError as error:
        return str(error)
    return None


def _with_vllm(memory: Memory, vllm: VLLM, gpu: int | None) -> Memory:
    """Let vLLM sample: it takes its share of a GPU, if it sleeps for the rollout alone; on a CPU a copy of the weights.

    Its keys and values on a CPU are not counted: VLLM_CPU_KVCACHE_SPACE says them.
    """
    taken = {"vLLM": memory.parts["weights"] if gpu is None else int(vllm.memory * gpu)}
    if vllm.sleep and gpu is not None:
        return replace(memory, moments={**memory.moments, "rollout": taken})
    return Memory({**memory.parts, **taken}, {**memory.moments, "rollout": {}})


def _room(place: Placement, gpu_memory: float | None) -> int:
    if gpu_memory is not None:
        return int(gpu_memory * GIB)
    if place.accelerator:
        if not torch.cuda.is_available():
            raise UserError("this machine has no GPU to compare with, and the config asks for some. Set --gpu_memory.")
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shown(name: str, value: Any) -> str:
    if "bytes" in name:
        return f"{value / GIB:.2f} GiB"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def options(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the options of `preflight` off the words; the others are those of `fit`."""
    parser = ArgumentParser(
        prog="python -m lightning_rlvr preflight",
        description="Say what a config takes: memory by part, work of a step, disk, terms that cannot act. It loads no "
        "weights; of a hub model it needs the small files. All options of fit are taken as well: --config FILE, "
        "--model.micro_batch_size 2. Exit status: 0 if it fits, 1 if not or if the model takes "
        "no such lengths, 2 if the config is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, help="JSON file for all that is found; none by default")
    parser.add_argument("--gpu_memory", type=float, help="GiB of each GPU (default: this machine's)")
    known, rest = parser.parse_known_args(list(words))
    return vars(known), rest
