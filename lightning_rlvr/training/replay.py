"""A rollout batch on disk, with the policy it was sampled from: what `compare` replays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_rlvr.models import finish_model
from lightning_rlvr.models.lora import save_model
from lightning_rlvr.training.gathering import on_first_rank
from lightning_rlvr.types import Rollouts, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_rlvr.training.experience import StepRecord
    from lightning_rlvr.training.module import RLVRModule


class Replay(NamedTuple):
    """A frozen rollout batch. `score` is the reward of each row, rows are prompt-major in groups of `group_size`."""

    rollouts: Rollouts
    score: Tensor
    row_id: Tensor
    group_size: int
    temperature: float
    policy: PreTrainedModel
    reference: PreTrainedModel | None


def save_replay(folder: Path, module: RLVRModule, record: StepRecord) -> None:
    """Write a rollout batch with the policy before its update, and the reference; the whole folder or none.

    All processes must call it; the first writes the rows of all.
    """
    from safetensors.torch import save_file

    whole = on_first_rank(record)
    models = {"policy": module.policy} | ({} if module.reference is None else {"reference": module.reference})
    states = {name: module.parallel.full_state(model) for name, model in models.items()}
    if whole is None:
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rollouts = whole.experience.rollouts
    tensors = {name: getattr(rollouts, name) for name in Rollouts.__dataclass_fields__}
    tensors["score"] = torch.tensor([verdict.score for verdict in whole.experience.verdicts], dtype=torch.float32)
    tensors["row_id"] = whole.stats.row_id
    about = {"group_size": whole.group_size, "temperature": module.sampling.temperature}
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial / "batch.safetensors")
    (partial / "batch.json").write_text(json.dumps(about), encoding="utf-8")
    for name, state in states.items():
        save_model(models[name], state, partial / name)
    module.tokenizer.save_pretrained(partial / "policy")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_replay(folder: Path) -> Replay:
    """Read what save_replay wrote.

    Raises: UserError if the folder does not hold a saved rollout batch, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if not (folder / "batch.safetensors").is_file():
        raise UserError(
            f"{folder} holds no saved rollout batch (batch.safetensors). Let fit save some with "
            "--save_rollouts.every_n_batches, and set rollouts to one of the folders RUN/rollouts/* or RUN/failed/*."
        )
    try:
        tensors = load_file(folder / "batch.safetensors")
        about = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
        models = {
            name: finish_model(AutoModelForCausalLM.from_pretrained(folder / name))
            for name in ("policy", "reference")
            if (folder / name).is_dir()
        }
        return Replay(
            rollouts=Rollouts(**{name: tensors[name] for name in Rollouts.__dataclass_fields__}),
            score=tensors["score"],
            row_id=tensors["row_id"],
            policy=models["policy"],
            reference=models.get("reference"),
            group_size=int(about["group_size"]),
            temperature=float(about["temperature"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds a damaged rollout batch: {error!r}. Set rollouts to another folder."
        ) from error
