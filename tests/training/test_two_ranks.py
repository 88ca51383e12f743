"""Every objective on two processes against one: loss, gradient and metrics. As a script, this file is one of the two.

test_distributed.py says that statistics and plans arrive whole; here the ranks' losses are summed, through parameters
that both share.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_rlvr.objectives import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SENT,
    AdaptiveEntropy,
    ClipCov,
    Clipped,
    DrGRPO,
    EntropyAdvantage,
    EntropyBonus,
    HighEntropyKL,
    HighEntropyMask,
    KLCov,
    SequenceClipped,
)
from lightning_rlvr.types import TokenBatch, TokenStats

ROOT = Path(__file__).parents[2]
ROWS, WIDTHS, UPDATES, PARAMETERS = 8, (5, 7), 2, 6
BETWEEN = 0.94  # the mean entropy over both ranks; less on one, more on the other
SENT_SETTINGS = {"low_entropy_quantile": 0.6, "high_cov_fraction": 0.2, "beta_low": 0.25, "beta_high": 1.5}
OBJECTIVES = {
    "grpo": GRPO(kl_coef=0.1),
    "grpo_tokens": GRPO(kl_coef=0.1, kl_to="old", kl_estimator="k2", aggregation="token_mean"),
    "dr_grpo": DrGRPO(fixed_length=9, kl_coef=0.3, kl_estimator="full"),
    "dapo": DAPO(),
    "gspo": GSPO(surrogate=SequenceClipped(low=0.05, high=0.08)),
    "cispo": CISPO(),
    "entropy_bonus": EntropyBonus(entropy_coef=0.2),
    "adaptive_up": AdaptiveEntropy(target=BETWEEN + 0.01, step=0.25),
    "adaptive_down": AdaptiveEntropy(target=BETWEEN - 0.01, step=0.25, initial=1.0),
    "entropy_advantage": EntropyAdvantage(),
    "high_entropy_mask": HighEntropyMask(fraction=0.3, kl_coef=0.2),
    "high_entropy_mask_tokens": HighEntropyMask(fraction=0.3, aggregation="token_mean"),
    "clip_cov": ClipCov(cov_low=0.05, cov_high=2.0, fraction=0.15),
    "kl_cov": KLCov(fraction=0.2, beta=0.5, aggregation="token_mean"),
    "sent": SENT(**SENT_SETTINGS),
    "sent_tokens": SENT(**SENT_SETTINGS, surrogate=Clipped(high=0.28), aggregation="token_mean", kl_estimator="full"),
    "sent_release": SENT(**SENT_SETTINGS, variant="release"),
    "high_entropy_kl": HighEntropyKL(**SENT_SETTINGS, covariance_scope="low_entropy"),
}


def load_distributed():
    """The module by itself: its package would import Lightning, which two processes need not wait for."""
    path = ROOT / "lightning_rlvr" / "training" / "distributed.py"
    spec = importlib.util.spec_from_file_location("distributed_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_of(rank):
    """Statistics and token values of a rank, with ties, as functions of parameters that all ranks share."""
    g, width = torch.Generator().manual_seed(rank), WIDTHS[rank]
    mask = torch.arange(width) < torch.randint(1, width + 1, (ROWS, 1), generator=g)
    mask[0] = True  # a row that fills the width
    # ranks differ in scale, so that a quantile or mean over one of them is not that over both
    old, entropy = (torch.randint(1, 9, (ROWS, width), generator=g).double() / 7 * (1 + rank) for _ in range(2))
    stats = TokenStats(
        logp=(-old).masked_fill(~mask, 5.0),
        entropy=entropy.masked_fill(~mask, -9.0),
        advantage=torch.randint(-2, 3, (ROWS,), generator=g).double() / 3 + rank / 2,
        mask=mask,
        row_id=2**61 + torch.randperm(2 * ROWS, generator=torch.Generator().manual_seed(9))[rank * ROWS :][:ROWS],
        update=torch.arange(ROWS) * UPDATES // ROWS,
    )
    features = torch.randn(3, ROWS, width, PARAMETERS, generator=g, dtype=torch.float64) / 9
    offsets = torch.randn(2, ROWS, width, generator=g, dtype=torch.float64) / 4

    def tokens(theta):
        logp, now, full_kl = features @ theta
        return TokenBatch(
            logp=stats.logp + offsets[0] + logp,
            old_logp=stats.logp,
            mask=mask,
            ref_logp=stats.logp + offsets[1],
            entropy=1 + now,
            full_kl=full_kl.square(),
        )

    return stats, tokens


def theta():
    return torch.linspace(-1, 1, PARAMETERS, dtype=torch.float64).requires_grad_()


def widened(value, width):
    return torch.nn.functional.pad(value, (0, width - value.shape[1])) if value.dim() == 2 else value


def both():
    """What one process with the rows of both ranks would hold."""
    parts, width = [data_of(rank) for rank in (0, 1)], max(WIDTHS)

    def joined(values):
        names = [name for name, value in vars(values[0]).items() if isinstance(value, torch.Tensor)]
        return {name: torch.cat([widened(getattr(v, name), width) for v in values]) for name in names}

    stats = TokenStats(**joined([stats for stats, _ in parts]))
    return stats, lambda theta: TokenBatch(**joined([tokens(theta) for _, tokens in parts]))


def rows_of(value, rows):
    return replace(value, **{n: x[rows] for n, x in vars(value).items() if isinstance(x, torch.Tensor)})


def train(objective, stats, tokens, gather, micro_batch):
    """Return loss, gradient, metrics and state of two rollout batches, as the training step makes them."""
    state, out = objective.initial_state(), []
    for _ in range(2):
        whole, mine = gather(stats)
        state = objective.next_state(state, whole)
        plan = objective.plan(replace(whole, state=state)).rows(mine)
        leaf, loss, gradient, metrics = theta(), 0.0, torch.zeros(PARAMETERS, dtype=torch.float64), {}
        values = tokens(leaf)
        values = replace(values, **{n: widened(x, plan.weight.shape[1]) for n, x in vars(values).items()})
        for rows in torch.arange(len(stats.mask)).split(micro_batch):
            got = objective.loss(rows_of(values, rows), plan.rows(rows))
            gradient += torch.autograd.grad(got.loss, leaf, retain_graph=True)[0]
            loss += got.loss.item()
            for name, (numerator, denominator) in got.metrics.items():
                n, d = metrics.get(name, (0.0, 0.0))
                metrics[name] = (n + float(numerator), d + float(denominator))
        out.append({"loss": loss, "gradient": gradient, "metrics": metrics, "state": state})
    return out


def worker(rank, folder):
    gather = load_distributed().gather_stats
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stats, tokens = data_of(rank)
    out = {name: train(objective, stats, tokens, gather, 3) for name, objective in OBJECTIVES.items()}
    torch.save(out, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes came to."""
    from support import two_processes  # not where this file runs as a script

    folder = tmp_path_factory.mktemp("two_ranks")
    two_processes(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def alone(objective):
    return train(objective, *both(), lambda stats: (stats, slice(None)), 2 * ROWS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_gradients_and_metrics_of_two_ranks_sum_to_those_of_one(ranks, name):
    expected = alone(OBJECTIVES[name])
    for batch, one in enumerate(expected):
        a, b = (rank[name][batch] for rank in ranks)
        assert a["loss"] + b["loss"] == pytest.approx(one["loss"], abs=1e-10, rel=0)
        torch.testing.assert_close(a["gradient"] + b["gradient"], one["gradient"], rtol=0, atol=1e-10)
        assert a["state"] == b["state"] == one["state"]
        assert a["metrics"].keys() == b["metrics"].keys() == one["metrics"].keys()
        for key, (numerator, denominator) in one["metrics"].items():
            sums = [x + y for x, y in zip(a["metrics"][key], b["metrics"][key], strict=True)]
            assert sums == [pytest.approx(numerator, abs=1e-10, rel=0), denominator], key
        assert a["gradient"].abs().max() > 1e-4  # each rank has its say
        assert b["gradient"].abs().max() > 1e-4


SCOPED = [n for n, o in OBJECTIVES.items() if isinstance(o, SENT | HighEntropyMask | ClipCov | KLCov | AdaptiveEntropy)]


@pytest.mark.parametrize("name", [*SCOPED, "grpo_tokens", "dapo", "cispo"])
def test_a_plan_over_one_rank_only_would_be_another(ranks, name):
    """The data can tell: statistics of each rank by itself, its denominators doubled, give another gradient."""
    by_itself = [train(OBJECTIVES[name], *data_of(rank), lambda stats: (stats, slice(None)), ROWS) for rank in (0, 1)]
    wrong = sum(out[1]["gradient"] for out in by_itself) / 2
    assert (wrong - sum(rank[name][1]["gradient"] for rank in ranks)).abs().max() > 1e-4


def test_the_state_moves_by_the_mean_over_both_ranks(ranks):
    means = [float(stats.entropy[stats.mask].mean()) for stats, _ in (data_of(0), data_of(1), both())]
    assert means[0] < BETWEEN - 0.01 < means[2] < BETWEEN + 0.01 < means[1]
    for name, expected in {"adaptive_up": [0.25, 0.5], "adaptive_down": [0.75, 0.5]}.items():
        for rank in ranks:
            assert [batch["state"]["entropy_coef"] for batch in rank[name]] == expected
    shares = [rank["adaptive_up"][1]["metrics"]["grad_share/entropy"] for rank in ranks]
    assert all(numerator == denominator > 0 for numerator, denominator in shares)
    assert all(rank["adaptive_down"][1]["metrics"]["grad_share/entropy"][0] == 0 for rank in ranks)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
