"""Policies from the checkpoints of `fit`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from lightning_rlvr.models.pretrained import file_digest
from lightning_rlvr.models.source import Policy, PolicySource
from lightning_rlvr.store import user_path
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "policy."  # of the policy's weights among a checkpoint's


@dataclass(frozen=True)
class Checkpoint(PolicySource):
    """The policy of a checkpoint: the one that training began with, with the checkpoint's weights in it.

    Args:
        path: the .ckpt file.
        source: where training began; None is model.policy of the config.yaml beside the checkpoint or above it.
    """

    path: str
    source: PolicySource | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the policy that training began with."""
        return self._origin().tokenizer()

    def prepare(self) -> None:
        """Prepare the policy that training began with."""
        self._origin().prepare()

    def load(self) -> Policy:
        """Return a fresh copy.

        Raises: UserError if the file is no checkpoint of `fit`, or one of another policy.
        """
        weights = {k.removeprefix(PREFIX): v for k, v in self._weights().items() if k.startswith(PREFIX)}
        policy = self._origin().load()
        named = policy.model.named_parameters(remove_duplicate=False)
        untrained = {name: weight.detach() for name, weight in named if not weight.requires_grad}
        try:
            policy.model.load_state_dict(untrained | weights)  # a checkpoint holds what is trained
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"path must be a checkpoint of the policy named in its run's config.yaml, got {self.path!r}: {reason}. "
                "Set the checkpoint's path or source."
            ) from error
        return policy

    def skeleton(self) -> PreTrainedModel:
        """Return the model that training began with, without weights."""
        return self._origin().skeleton()

    def fingerprint(self) -> str:
        """Hash the file's content and what decides the policy that training began with."""
        facts = f"{self._origin().fingerprint()} {file_digest(self._file())}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _file(self) -> Path:
        path = user_path(self.path, "model.policy.init_args.path")
        if not path.is_file():
            found = (
                "that is a folder of parts; take the run's policy/ as a Pretrained"
                if path.is_dir()
                else "there is none"
            )
            raise UserError(f"path must be a checkpoint file, got {self.path!r}: {found}. Set its path.")
        return path

    def _weights(self) -> dict[str, Any]:
        try:
            stored = torch.load(self._file(), map_location="cpu", weights_only=True)
            weights: dict[str, Any] = stored["state_dict"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"path must be a checkpoint that `fit` wrote, got {self.path!r}: {reason}. Set its path."
            ) from error
        return weights

    def _origin(self) -> PolicySource:
        """Return where training began."""
        if self.source is not None:
            return self.source
        file = self._file()
        config = next((p / "config.yaml" for p in file.absolute().parents if (p / "config.yaml").is_file()), None)
        if config is None:
            raise UserError(
                f"a checkpoint must lie in its run's folder, got {self.path!r}: no folder above it has a config.yaml, "
                "which names the policy that training began with. Move it back, or set its source."
            )
        return _policy_of(config)


def _policy_of(config: Path) -> PolicySource:
    """Build model.policy of a run's config."""
    import yaml
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicySource)
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["policy"]
        source: PolicySource = parser.instantiate_classes(parser.parse_object({"policy": settings})).policy
    except Exception as error:  # jsonargparse and yaml raise many kinds on what is not a run's config
        raise UserError(
            f"{config} must be the config of a run, with its policy under model.policy, but: {error}. "
            "Set the checkpoint's source."
        ) from error
    return source
