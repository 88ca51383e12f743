"""What the stages hand to each other: one vocabulary, no logic.

Shapes: B prompts, G responses a prompt, N = B * G rows, P prompt tokens, T response tokens. Rows are
prompt-major: row i * G + j is response j to prompt i. Masks are bool and True means "the token counts":
EOS counts, padding and prompt never do. Log-probabilities, entropies and KL are in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

PREEMPTED = 128 + 15  # exit status of a run that was asked to stop, as by SIGTERM, and has saved


class UserError(ValueError):
    """Something the user can put right: the command line prints its text and no traceback."""


# --- questions and verdicts ------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One question with its gold answer. `uid` is stable across runs and unique in its data set."""

    uid: str
    text: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """The text of one response without special tokens; `truncated` if it met the length limit before EOS."""

    text: str
    truncated: bool = False
    tokens: int = 0  # its length, EOS included


class Status(str, Enum):
    """What a verifier found; only CORRECT counts as solved."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Verdict:
    """The reward of one response, why, the final answer found in it, and the parts of a summed reward."""

    score: float
    status: Status
    answer: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether the response solves the question, whatever its reward."""
        return self.status is Status.CORRECT


class Task(ABC):
    """A source of questions."""

    @abstractmethod
    def load(self) -> list[Prompt]:
        """Return all questions, in a fixed order. Raises UserError that names the key to change."""


class Teacher(ABC):
    """A source of worked solutions for the supervised warm start of the embedded policy."""

    @abstractmethod
    def examples(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (prompt text, solution text) without end, determined by `seed`."""


class Reward(ABC):
    """A verifier with a score: judges responses and says which answers mean the same.

    `repr` shows all settings that decide verdicts: scores of questions are cached by it.
    """

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - most verifiers accept any prompt
        """Raise UserError if a prompt cannot be judged (an unparsable gold answer, say)."""

    def unjudgeable(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the places of the prompts that `check` would refuse, to be dropped and counted."""
        return []

    @abstractmethod
    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i]."""

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Say for each pair of final answers whether they mean the same; need not be transitive."""
        return [a == b for a, b in pairs]

    def close(self) -> None:  # noqa: B027 - most verifiers hold nothing
        """Release worker processes, if any. The next call starts them again."""


# --- rollouts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. temperature 0 is greedy; top_p 1 and top_k 0 leave the policy whole."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for ok, key, value, rule in (
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1 token"),
            (self.temperature >= 0, "temperature", self.temperature, ">= 0 (0 is greedy)"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1] (1 keeps all tokens)"),
            (self.top_k >= 0, "top_k", self.top_k, ">= 0 (0 keeps all tokens)"),
        ):
            if not ok:
                raise UserError(f"{key} must be {rule}, got {value}. Set sampling.{key}.")


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses. `logp` and `entropy` are of the distribution really sampled from (temperature,
    top-p and top-k applied), recorded while sampling; uncounted positions hold 0.
    """

    prompt_ids: Int[Tensor, "N P"]  # left-padded
    prompt_mask: Bool[Tensor, "N P"]
    response_ids: Int[Tensor, "N T"]  # right-padded
    mask: Bool[Tensor, "N T"]
    logp: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    truncated: Bool[Tensor, " N"]

    def rows(self, index: Tensor | slice) -> Rollouts:
        """Return the given rows."""
        return _rows(self, index)

    def to(self, device: torch.device | str) -> Rollouts:
        """Return them on a device."""
        return Rollouts(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class Engine(ABC):
    """Samples responses from a policy."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        samples: int,
        sampling: Sampling,
    ) -> Rollouts:
        """Sample `samples` responses to each prompt (token ids, not empty).

        seeds[i] alone decides the randomness of prompt i, so a response depends neither on the prompts
        beside it nor on how the batch is cut.
        """


# --- token statistics, plan, loss ------------------------------------------------------------------


@dataclass(frozen=True)
class TokenStats:
    """Detached statistics of a whole rollout batch, over all ranks: all that a plan may look at.

    `row_id` is unique and names a row whatever its place in the batch; it settles ties. `update` is the
    optimizer step, within this rollout batch, in which the row is used: denominators run over it. `state` is
    what the objective carries from one rollout batch to the next (Objective.next_state).
    """

    logp: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    advantage: Float[Tensor, " N"]
    mask: Bool[Tensor, "N T"]
    row_id: Int[Tensor, " N"]
    update: Int[Tensor, " N"]
    state: Mapping[str, float] = field(default_factory=dict)

    def counted(self) -> Int[Tensor, " K"]:
        """Return the flat indices (row * T + position) of the counted tokens in canonical order.

        The order is by row_id, then position. It is the same tokens in the same order whatever the order
        of rows and the width of the padding, so sums round and ties break the same way.

        Raises: ValueError if two rows have the same id.
        """
        by_id = torch.argsort(self.row_id)
        if (self.row_id[by_id].diff() == 0).any():
            raise ValueError("row_id must name each row once: equal ids leave the order of tokens open")
        row, position = self.mask[by_id].nonzero(as_tuple=True)
        return by_id[row] * self.mask.shape[1] + position

    def spread(self, values: Shaped[Tensor, " K"]) -> Shaped[Tensor, "N T"]:
        """Return values of the counted tokens, in canonical order, at their places; 0 or False elsewhere."""
        flat = values.new_zeros(self.mask.numel())
        flat[self.counted()] = values
        return flat.view(self.mask.shape)

    def token_advantage(self) -> Float[Tensor, "N T"]:
        """Return the advantage of each token: its row's."""
        return self.advantage[:, None].expand(self.mask.shape)


@dataclass(frozen=True)
class TokenPlan:
    """What the objective decided for each token. Uncounted positions hold 0 and False.

    `weight` holds the aggregation with its denominators: the loss is the sum over tokens of
    weight * (policy term + kl_weight * KL + drift_weight * |log r| - entropy_weight * H), hence additive over any
    cut into rows. A term without weights is not computed.
    """

    advantage: Float[Tensor, "N T"]
    weight: Float[Tensor, "N T"]
    kl_weight: Float[Tensor, "N T"]
    policy_mask: Bool[Tensor, "N T"]  # tokens that take part in the policy gradient
    drift_weight: Float[Tensor, "N T"] | None = None
    entropy_weight: Float[Tensor, "N T"] | None = None
    classes: Mapping[str, Bool[Tensor, "N T"]] = field(default_factory=dict)  # for the logs

    def rows(self, index: Tensor | slice) -> TokenPlan:
        """Return the plan of the given rows."""
        return _rows(self, index)

    def width(self, tokens: int) -> TokenPlan:
        """Return the plan of the first `tokens` columns: what other ranks padded this one's rows with goes."""
        return _rows(self, (slice(None), slice(tokens)))


@dataclass(frozen=True)
class TokenBatch:
    """Token values of the rows at hand. `logp`, `entropy` and `full_kl` carry gradients, the others none.

    `entropy` and `full_kl`, the exact KL to the reference over the vocabulary, are there if the objective needs them.
    """

    logp: Float[Tensor, "N T"]
    old_logp: Float[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    ref_logp: Float[Tensor, "N T"] | None = None
    entropy: Float[Tensor, "N T"] | None = None
    full_kl: Float[Tensor, "N T"] | None = None


class Ratio(NamedTuple):
    """A metric that adds up: sum both over micro-batches and ranks, then divide."""

    numerator: Tensor
    denominator: Tensor


class ObjectiveOutput(NamedTuple):
    """The loss summed over the rows at hand, in the plan's weights, its metrics, and the tokens that were clipped."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Ratio]
    clipped: Bool[Tensor, "N T"]


class Objective(ABC):
    """What is maximised, as a page of maths: no state, no logging, no Lightning."""

    scale_by_std: bool  # whether group advantages are divided by the group's standard deviation

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether the loss reads the frozen reference."""

    @property
    def needs_full_kl(self) -> bool:
        """Whether the loss reads the exact KL to the reference."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss reads entropies with their gradient."""
        return False

    def initial_state(self) -> dict[str, float]:
        """Return what the objective carries into the first rollout batch: nothing, for most."""
        return {}

    def next_state(self, state: Mapping[str, float], stats: TokenStats) -> dict[str, float]:
        """Return what it carries on to the next rollout batch, having planned with `state` for this one."""
        return dict(state)

    def inert(self, updates_per_rollout: int) -> list[str]:
        """Say, for each term that cannot act with these settings, why, and which key to change."""
        return []

    @abstractmethod
    def plan(self, stats: TokenStats) -> TokenPlan:
        """Decide for each token of the whole batch its advantage, weights and part in the loss."""

    @abstractmethod
    def loss(self, tokens: TokenBatch, plan: TokenPlan) -> ObjectiveOutput:
        """Sum the loss over the rows at hand, by the plan's weights."""


_Batch = TypeVar("_Batch", "Rollouts", "TokenPlan")


def _rows(batch: _Batch, index: Tensor | slice | tuple[slice, slice]) -> _Batch:
    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: pick(item) for key, item in value.items()}
        return None if value is None else value[index]

    return replace(batch, **{f.name: pick(getattr(batch, f.name)) for f in fields(batch)})
