"""Low-rank adapters: a policy of which a few weights are trained, whose reference is what lies beneath them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rlvr.models.source import Policy, PolicySource
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"  # peft's name for the only one


@dataclass(frozen=True)
class LoRA(PolicySource):
    """Another policy with adapters: W x + alpha / rank * B A x, of which A and B are trained. Needs the extra `lora`.

    At the start B is 0: it is the other policy. The frozen reference shares the other policy's weights, and
    checkpoints hold the adapters only. `fit` exports it with the adapters added to the weights.

    Args:
        policy: what lies beneath.
        rank: of the product B A.
        alpha: scales it.
        targets: ends of the names of the linear layers that get adapters; all-linear is all but the output layer.
        seed: decides the initial A. The global random state is not touched.

    Source: Hu et al. (2021), arXiv 2106.09685; with peft.
    """

    policy: PolicySource
    rank: int = 16
    alpha: int = 32
    targets: list[str] | str = "all-linear"
    seed: int = 1

    def __post_init__(self) -> None:
        for key in ("rank", "alpha"):
            if getattr(self, key) <= 0:
                raise UserError(
                    f"{key} must be positive, got {getattr(self, key)}: adapters add alpha / rank * B A to a weight. "
                    f"Set model.policy.init_args.{key}."
                )
        if importlib.util.find_spec("peft") is None:
            raise UserError(
                "LoRA needs the package peft, which is not installed: pip install 'lightning_rlvr[lora]', or set "
                "model.policy to the policy itself."
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the policy beneath."""
        return self.policy.tokenizer()

    def prepare(self) -> None:
        """Prepare the policy beneath."""
        self.policy.prepare()

    def load(self) -> Policy:
        """Return a fresh copy.

        Raises: UserError if no layer has a name that `targets` asks for.
        """
        model, tokenizer = self.policy.load()
        return Policy(self._adapted(model), tokenizer)

    def skeleton(self) -> PreTrainedModel:
        """Return the model beneath on the meta device, with its adapters. Raises: UserError as `load` does."""
        return self._adapted(self.policy.skeleton())

    def _adapted(self, model: PreTrainedModel) -> PreTrainedModel:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, target_modules=self.targets)
        training = model.training
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed)
            try:
                inject_adapter_in_model(config, model)
            except ValueError as error:
                raise UserError(
                    f"targets must name linear layers of the policy, got {self.targets!r}: {error}. "
                    "Set model.policy.init_args.targets."
                ) from error
        return model.train(training)

    def fingerprint(self) -> str:
        """Return that of the policy beneath, which this one is before it is trained."""
        return self.policy.fingerprint()


def adapted(model: PreTrainedModel) -> bool:
    """Whether a model has adapters."""
    return hasattr(model, "peft_config")


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen model that is what this one is at the start of training: a copy.

    What has adapters shares all other weights with it.
    """
    if not adapted(model):
        return copy.deepcopy(model).requires_grad_(False).eval()
    beneath = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    for name, layer in list(_layers(beneath)):
        beneath.set_submodule(name, layer.get_base_layer())
    del beneath.peft_config
    return beneath.requires_grad_(False).eval()


def save_model(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model with the given weights in Hugging Face format, as one that has no adapters."""
    model.save_pretrained(folder, state_dict=merged(model, state))


def merged(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights `state` of a model under the names, and with the values, that they have without adapters."""
    whole = {name: weight for name, weight in state.items() if ".lora_" not in name}
    for name, layer in _layers(model):
        a, b = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        weight = whole.pop(f"{name}.base_layer.weight")
        added = layer.scaling[ADAPTER] * (b @ a)
        whole[f"{name}.weight"] = (weight + (added.T if layer.fan_in_fan_out else added)).to(weight.dtype)
        if f"{name}.base_layer.bias" in whole:
            whole[f"{name}.bias"] = whole.pop(f"{name}.base_layer.bias")
    return whole


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Return the layers with adapters, by name."""
    if not adapted(model):
        return iter(())
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
