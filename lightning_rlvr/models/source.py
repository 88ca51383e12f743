"""Where a policy's weights come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lightning_rlvr.types import Response, Rollouts, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Policy(NamedTuple):
    """A causal language model with the tokenizer it reads by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end a response: the model's, or the tokenizer's if it names none."""
        named = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if named in (None, []) else named
        return [eos] if isinstance(eos, int) else list(eos)

    def decode(self, rollouts: Rollouts) -> list[Response]:
        """Return the texts of the responses, without special tokens."""
        return decode(self.tokenizer, rollouts)


def decode(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> list[Response]:
    """Return the texts of the responses, without special tokens."""
    ids = [row[keep].tolist() for row, keep in zip(rollouts.response_ids, rollouts.mask, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    truncated = rollouts.truncated.tolist()
    return [Response(text, cut, len(row)) for text, cut, row in zip(texts, truncated, ids, strict=True)]


class PolicySource(ABC):
    """A source of the initial policy, which is also the frozen reference."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer without loading weights. Raises UserError if it cannot be found."""

    @abstractmethod
    def prepare(self) -> None:
        """Do what is slow and needed once a machine (download, train); call it on one process, then wait.

        Calling it again is cheap. Raises UserError if the policy cannot be had.
        """

    @abstractmethod
    def load(self) -> Policy:
        """Return a fresh copy, in evaluation mode and without dropout even in training mode.

        Leaves the global random state as it was. Raises UserError if the policy cannot be had.
        """

    def skeleton(self) -> PreTrainedModel:
        """Return the model as `load` gives it, on the meta device: shapes without weights, from small files only.

        Raises: UserError if the source does not know its model before its weights, or cannot be found.
        """
        raise UserError(f"{type(self).__name__} cannot say what its model is without its weights. Set model.policy.")

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of all that decides the weights, the same in every process."""


def finish_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer a pad token (its EOS) if it has none.

    Raises: UserError if it has no EOS: responses could then only end at the length limit.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer must have an EOS token, got eos_token=None from {tokenizer.name_or_path!r}: without "
            "it no response ends before the length limit. Set model.policy.init_args.name (in evaluate: models)."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def finish_model(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model into the state that every policy starts from.

    Dropout is 0, since log-probabilities recorded while sampling must be met again in training. The input
    embedding's padding_idx is None: a pad token that also occurs in prompts (SmolLM2: <|im_end|>) would
    otherwise lose its row's gradient.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
    return model.eval()
