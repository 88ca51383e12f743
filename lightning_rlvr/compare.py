"""One frozen rollout batch under many objectives: what each of them does to the same policy."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from lightning_rlvr.models.forward import response_logp
from lightning_rlvr.ops.advantages import group_advantages
from lightning_rlvr.store import make_folder
from lightning_rlvr.training.replay import Replay, load_replay
from lightning_rlvr.types import Objective, TokenBatch, TokenStats, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHUNK = 2**20  # parameters in float64 at a time


@dataclass(frozen=True)
class Effect:
    """What one objective does to the batch: its row of the table, its gradient, and the tokens it singled out."""

    row: dict[str, float]
    gradient: Tensor  # [parameters], float32
    chosen: Tensor  # [N, T] bool


def compare(
    rollouts: Path,
    objectives: dict[str, Objective],
    output: Path | None = None,
    eta: float = 0.01,
    micro_batch_size: int = 32,
) -> pd.DataFrame:
    """Replay a saved rollout batch under each objective and write table and picture.

    For each objective: its loss, the norm of its gradient, the shares of tokens that its terms pull on, and the change
    of the mean token entropy (nats, on the contexts of the batch) after one plain gradient step of size eta:
    measured, to first order (the inner product of both gradients), and as the covariance theory has it,
    -eta * Cov(log pi, a), with a the weight that the objective puts on raising each token's log-probability.
    compare.csv holds these rows, cosine.csv the cosines of the gradients, overlap.csv the Jaccard index of the tokens
    singled out (SENT's T_low, KL-Cov's held tokens, ...), and compare.png shows them. Where a gradient is 0, so that it
    has no direction, cosines are nan. Terms that cannot act here, and a batch that teaches nothing, are warned of.

    Args:
        rollouts: a folder RUN/rollouts/N that `fit --save_rollouts.every_n_batches` wrote.
        objectives: by name.
        output: folder for the results; `compare` in the rollouts folder if not given.
        eta: size of the gradient step.
        micro_batch_size: rows in a pass; changes memory and speed only.

    Raises: UserError if there is no such batch, an objective reads a reference that it lacks, or a setting is refused.
    Source: covariance theory of entropy, arXiv 2505.22617 and 2512.04359.
    """
    if not objectives:
        raise UserError("there is nothing to compare without objectives. Set objectives to a mapping of names.")
    if micro_batch_size < 1:
        raise UserError(f"micro_batch_size must be at least 1 row, got {micro_batch_size}. Set --micro_batch_size.")
    replay = load_replay(rollouts)
    for name, objective in objectives.items():
        if objective.needs_reference and replay.reference is None:
            raise UserError(
                f"objective {name!r} reads the reference, which {rollouts} does not hold: the run that saved it had "
                "none. Save rollouts in a run with a KL penalty, or set objectives without."
            )
    folder = output or rollouts / "compare"
    make_folder(folder, "output")
    _warn_of_inert(replay, rollouts, objectives)
    cut = torch.arange(len(replay.score)).split(micro_batch_size)
    stats = _statistics(replay, cut)
    entropy_gradient = _entropy_gradient(replay, cut)
    effects = {
        name: _effect(replay, objective, stats, entropy_gradient, eta, cut) for name, objective in objectives.items()
    }
    table = pd.DataFrame({name: effect.row for name, effect in effects.items()}).T.rename_axis("objective")
    cosine = _matrix(effects, lambda a, b: cosine_of(a.gradient, b.gradient))
    overlap = _matrix(effects, _jaccard)
    for name, frame in (("compare", table), ("cosine", cosine), ("overlap", overlap)):
        frame.to_csv(folder / f"{name}.csv")
    _picture(table, cosine, overlap, eta, folder / "compare.png")
    return table


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors, summed in float64 chunk by chunk, so that no whole copy is made.

    In float32 a sum over a hundred million parameters is off in its second digit.
    """
    return sum(float(x.double() @ y.double()) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True))


def cosine_of(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two vectors, nan if one of them is 0.

    >>> cosine_of(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]))
    0.96
    """
    norms = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / norms if norms else math.nan


def _warn_of_inert(replay: Replay, rollouts: Path, objectives: dict[str, Objective]) -> None:
    for name, objective in objectives.items():
        for reason in objective.inert(updates_per_rollout=1):
            warnings.warn(
                f"{name} has a term that cannot act in a batch's first update, the one that compare takes: {reason}",
                stacklevel=3,
            )
    if not group_advantages(replay.score.view(-1, replay.group_size), scale_by_std=False).any():
        warnings.warn(
            f"all groups of {rollouts} had equal rewards: all advantages are 0, and so are the policy gradients. Set "
            "rollouts to a batch in which rewards differ.",
            stacklevel=3,
        )


@torch.no_grad()
def _statistics(replay: Replay, cut: tuple[Tensor, ...]) -> TokenStats:
    parts = [response_logp(replay.policy, replay.rollouts.rows(r), replay.temperature, True) for r in cut]
    return TokenStats(
        logp=torch.cat([part.logp for part in parts]),
        entropy=torch.cat([part.entropy for part in parts if part.entropy is not None]),
        advantage=torch.zeros_like(replay.score),
        mask=replay.rollouts.mask,
        row_id=replay.row_id,
        update=torch.zeros_like(replay.row_id),
    )


def _entropy_gradient(replay: Replay, cut: tuple[Tensor, ...]) -> Tensor:
    """Return the gradient of the mean token entropy of the batch."""
    replay.policy.zero_grad()
    for rows in cut:
        part = replay.rollouts.rows(rows)
        entropy = response_logp(replay.policy, part, replay.temperature, True).entropy
        assert entropy is not None
        (entropy.sum() / replay.rollouts.mask.sum()).backward()
    return _gradient(replay.policy)


def _effect(
    replay: Replay,
    objective: Objective,
    stats: TokenStats,
    entropy_gradient: Tensor,
    eta: float,
    cut: tuple[Tensor, ...],
) -> Effect:
    advantage = group_advantages(replay.score.view(-1, replay.group_size), objective.scale_by_std).flatten()
    stats = replace(stats, advantage=advantage, state=objective.initial_state())
    plan = objective.plan(stats)
    policy = copy.deepcopy(replay.policy)
    policy.zero_grad()
    loss, sums, pulls = 0.0, dict[str, list[float]](), []
    for rows in cut:
        part = replay.rollouts.rows(rows)
        tokens, logp = _tokens(replay, policy, objective, part, stats.logp[rows])
        out = objective.loss(tokens, plan.rows(rows))
        logp.retain_grad()
        out.loss.backward()
        assert logp.grad is not None
        pulls.append(-logp.grad.masked_fill(~part.mask, 0.0))
        loss += float(out.loss.detach())
        for name, ratio in out.metrics.items():
            known = sums.setdefault(name, [0.0, 0.0])
            known[0], known[1] = known[0] + float(ratio.numerator), known[1] + float(ratio.denominator)
    gradient = _gradient(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.sub_(eta * parameter.grad)
    after = torch.cat([_entropy(policy, replay, rows) for rows in cut])
    mask = stats.mask
    logp_counted, pull = stats.logp[mask].double(), torch.cat(pulls)[mask].double() * mask.sum()
    covariance = ((logp_counted - logp_counted.mean()) * (pull - pull.mean())).mean()
    shares = {f"share/{k}": float(v[mask].float().mean()) for k, v in plan.classes.items()}
    row = {
        "loss": loss,
        "grad_norm": math.sqrt(dot(gradient, gradient)),
        "entropy_change/measured": float((after - stats.entropy)[mask].double().mean()),
        "entropy_change/first_order": -eta * dot(gradient, entropy_gradient),
        "entropy_change/covariance": -eta * float(covariance),
        **{name: total / count if count else float("nan") for name, (total, count) in sums.items()},
        **shares,
    }
    chosen = torch.stack(list(plan.classes.values())).any(dim=0) if plan.classes else torch.zeros_like(mask)
    return Effect(row, gradient, chosen)


def _tokens(
    replay: Replay, policy: Any, objective: Objective, part: Any, old_logp: Tensor
) -> tuple[TokenBatch, Tensor]:
    values = response_logp(
        policy, part, replay.temperature, objective.needs_entropy, replay.reference if objective.needs_full_kl else None
    )
    ref_logp = None
    if objective.needs_reference and replay.reference is not None:
        with torch.no_grad():
            ref_logp = response_logp(replay.reference, part, replay.temperature).logp
    tokens = TokenBatch(values.logp, old_logp, part.mask, ref_logp, values.entropy, values.full_kl)
    return tokens, values.logp


@torch.no_grad()
def _entropy(policy: Any, replay: Replay, rows: Tensor) -> Tensor:
    entropy = response_logp(policy, replay.rollouts.rows(rows), replay.temperature, True).entropy
    assert entropy is not None
    return entropy


def _gradient(model: Any) -> Tensor:
    parts = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in model.parameters()]
    return torch.cat(parts)


def _jaccard(a: Effect, b: Effect) -> float:
    union = int((a.chosen | b.chosen).sum())
    return int((a.chosen & b.chosen).sum()) / union if union else float("nan")


def _matrix(effects: dict[str, Effect], value: Any) -> pd.DataFrame:
    """Return a symmetric value of each pair of effects: each is computed once, gradients being as long as the model."""
    matrix = pd.DataFrame(index=list(effects), columns=list(effects), dtype=float)
    for a, b in itertools.combinations_with_replacement(effects, 2):
        matrix.loc[a, b] = matrix.loc[b, a] = value(effects[a], effects[b])
    return matrix


def _picture(table: pd.DataFrame, cosine: pd.DataFrame, overlap: pd.DataFrame, eta: float, path: Path) -> None:
    """Draw entropy changes and gradient norms as bars, cosines and overlaps as maps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 3 + 0.45 * len(table)
    figure = Figure(figsize=(2.2 * size, 1.9 * size), layout="constrained")
    FigureCanvasAgg(figure)
    (top_left, top_right), (left, right) = figure.subplots(2, 2)
    changes = table.filter(like="entropy_change/").rename(columns=lambda c: c.removeprefix("entropy_change/"))
    _bars(top_left, changes, f"change of mean token entropy in one step of {eta:g} (nats)")
    _bars(top_right, table[["grad_norm"]], "norm of the gradient")
    _map(figure, left, cosine, "cosine of gradients", "RdBu", -1)
    _map(figure, right, overlap, "overlap of the tokens singled out (Jaccard)", "Blues", 0)
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, frame: pd.DataFrame, title: str) -> None:
    height = 0.8 / len(frame.columns)
    for i, column in enumerate(frame.columns):
        axes.barh([row + i * height for row in range(len(frame))], frame[column], height, label=column)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(frame))], list(frame.index))
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(title, loc="left", fontsize=10)
    if len(frame.columns) > 1:
        axes.legend(fontsize=8)


def _map(figure: Any, axes: Axes, frame: pd.DataFrame, title: str, colours: str, low: float) -> None:
    image = axes.imshow(frame.to_numpy(dtype=float), cmap=colours, vmin=low, vmax=1)
    axes.set_xticks(range(len(frame)), list(frame.columns), rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(frame)), list(frame.index), fontsize=8)
    for i, row in enumerate(frame.to_numpy(dtype=float).tolist()):
        for j, value in enumerate(row):
            colour = "white" if value > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7)


def main(args: list[str]) -> None:
    """`python -m lightning_rlvr compare`: arguments or a YAML file (--config), printed as a table."""
    from jsonargparse import auto_cli
    from rich.table import Table

    from lightning_rlvr.analysis.screen import show

    table = auto_cli(compare, args=args, as_positional=False, prog="python -m lightning_rlvr compare")
    changes = [f"entropy_change/{kind}" for kind in ("measured", "first_order", "covariance")]
    caption = "dH: change of the mean token entropy in one step (nats)"
    view = Table("objective", "loss", "grad norm", "dH measured", "dH 1st order", "dH theory", caption=caption)
    for name, row in table[["loss", "grad_norm", *changes]].iterrows():
        view.add_row(str(name), *(f"{value:.4g}" for value in row))
    show(view)
