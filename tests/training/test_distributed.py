"""Statistics over ranks. Run as a script, this file is one of two processes that train together."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_rlvr.objectives import GRPO, SENT
from lightning_rlvr.types import Ratio, TokenPlan, TokenStats

ROOT = Path(__file__).parents[2]
WIDTHS = (5, 8)  # of the padding on each rank
ROWS = 6
OBJECTIVES = {
    "grpo": GRPO(kl_coef=0.1),
    "grpo_tokens": GRPO(aggregation="token_mean"),
    "sent": SENT(high_cov_fraction=0.1),
    "sent_low": SENT(low_entropy_quantile=0.5, high_cov_fraction=0.3, covariance_scope="low_entropy"),
}


def load_distributed():
    """The module by itself: its package would import Lightning, which two processes need not wait for."""
    path = ROOT / "lightning_rlvr" / "training" / "distributed.py"
    spec = importlib.util.spec_from_file_location("distributed_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stats_of(rank):
    """The rows of a rank, with ties in entropy and covariance, and nonsense in the padding."""
    g = torch.Generator().manual_seed(rank)
    width = WIDTHS[rank]
    mask = torch.arange(width) < torch.randint(1, width + 1, (ROWS, 1), generator=g)
    mask[0] = True  # a row that fills the width
    logp, entropy = (torch.randint(0, 12, (ROWS, width), generator=g) / 7 for _ in range(2))
    # ids that sort otherwise than ranks, 63 bits long: neighbours would be equal in float64
    row_id = 2**62 + torch.arange(2 * ROWS)[torch.randperm(2 * ROWS, generator=torch.Generator().manual_seed(9))]
    return TokenStats(
        logp=(-logp).masked_fill(~mask, 50.0),
        entropy=entropy.masked_fill(~mask, -9.0),
        advantage=torch.randint(-2, 3, (ROWS,), generator=g) / 3,
        mask=mask,
        row_id=row_id[rank * ROWS : (rank + 1) * ROWS],
        update=torch.arange(ROWS) * 2 // ROWS,
        state={"coefficient": 0.5},
    )


def tensors(record):
    return {name: value for name, value in vars(record).items() if isinstance(value, torch.Tensor)}


def columns(value, width, fill):
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill)


def all_rows():
    """What one process with the rows of both ranks would hold."""
    a, b = stats_of(0), stats_of(1)
    width = max(WIDTHS)
    parts = {}
    for name in ("logp", "entropy", "mask"):
        parts[name] = torch.cat([columns(getattr(s, name), width, 0) for s in (a, b)])
    for name in ("advantage", "row_id", "update"):
        parts[name] = torch.cat([getattr(a, name), getattr(b, name)])
    return TokenStats(**parts, state=a.state)


def worker(rank, folder):
    distributed = load_distributed()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stats = stats_of(rank)
    out = {"world": distributed.world_size()}
    whole, mine = distributed.gather_stats(stats)
    out["whole"], out["mine"] = vars(whole), (mine.start, mine.stop)
    out["plans"] = {name: vars(objective.plan(whole).rows(mine)) for name, objective in OBJECTIVES.items()}
    double = replace(stats, logp=stats.logp.double() + 1e-12, entropy=stats.entropy.double())
    out["double"] = distributed.gather_stats(double)[0].logp
    sums = {"mean": (3.0 * rank, 4.0), "never": (0.0, 0.0), "here": (5.0 * rank, 2.0 * rank)}
    if rank:  # the order of names must not matter
        sums = dict(reversed(sums.items()))
    out["ratios"] = distributed.reduce_ratios({k: Ratio(*map(torch.tensor, v)) for k, v in sums.items()})
    try:
        distributed.gather_stats(stats if rank else replace_rows(stats, ROWS - 1))
    except ValueError as error:
        out["error"] = str(error)
    torch.save(out, folder / f"{rank}.pt")
    dist.destroy_process_group()


def replace_rows(stats, rows):
    return replace(stats, **{name: value[:rows] for name, value in tensors(stats).items()})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes came to."""
    from support import two_processes  # not where this file runs as a script

    folder = tmp_path_factory.mktemp("ranks")
    two_processes(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_both_ranks_get_all_rows_padded_to_the_wider(ranks):
    expected = all_rows()
    assert [r["world"] for r in ranks] == [2, 2]
    for rank in ranks:
        whole = TokenStats(**rank["whole"])
        for name, value in vars(expected).items():
            got = getattr(whole, name)
            if name == "state":  # the same on all ranks, so it is not sent
                assert got == value
                continue
            assert got.dtype == value.dtype, name
            if name in ("logp", "entropy"):  # what stands in padding does not matter
                got, value = got * expected.mask, value * expected.mask
            assert torch.equal(got, value), name


def test_each_rank_finds_its_own_rows(ranks):
    for r, rank in enumerate(ranks):
        whole, mine = TokenStats(**rank["whole"]), slice(*rank["mine"])
        for name, value in tensors(stats_of(r)).items():
            got = getattr(whole, name)[mine]
            assert torch.equal(got[:, : WIDTHS[r]] if got.dim() == 2 else got, value), name
    assert ranks[0]["mine"] != ranks[1]["mine"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_plan_of_two_ranks_is_that_of_one(ranks, name):
    plan = OBJECTIVES[name].plan(all_rows())
    for rank in ranks:
        expected, got = plan.rows(slice(*rank["mine"])), TokenPlan(**rank["plans"][name])
        assert tensors(got).keys() == tensors(expected).keys()
        assert got.classes.keys() == expected.classes.keys()
        pairs = [(tensors(got), tensors(expected)), (got.classes, expected.classes)]
        for a, b in pairs:
            assert all(torch.equal(a[key], b[key]) for key in b)
    if name.startswith("sent"):
        alone = [OBJECTIVES[name].plan(stats_of(r)).kl_weight for r in (0, 1)]
        both = [ranks[r]["plans"][name]["kl_weight"][:, : WIDTHS[r]] for r in (0, 1)]
        assert any(not torch.equal(a, b) for a, b in zip(alone, both, strict=True))  # scope is the whole batch


def test_float64_arrives_whole(ranks):
    mine = stats_of(1)
    got = ranks[0]["double"][ROWS:]
    assert got.dtype == torch.float64
    assert torch.equal(got[mine.mask], (mine.logp.double() + 1e-12)[mine.mask])


def test_ratios_sum_before_they_divide(ranks):
    for rank in ranks:
        ratios = rank["ratios"]
        assert ratios["mean"] == 3.0 / 8.0
        assert ratios["here"] == 2.5
        assert ratios["never"] != ratios["never"]  # nan
        assert set(ratios) == {"mean", "here", "never"}


def test_ranks_with_different_numbers_of_rows_are_told_so(ranks):
    assert [r["error"] for r in ranks] == ["ranks must hold equally many rows, got 5 to 6"] * 2


def test_one_process_sends_nothing():
    distributed = load_distributed()
    stats = stats_of(0)
    whole, mine = distributed.gather_stats(stats)
    assert whole is stats
    assert mine == slice(None)
    assert distributed.world_size() == 1
    got = distributed.reduce_ratios(
        {"a": Ratio(torch.tensor(1), torch.tensor(4)), "n": Ratio(torch.tensor(0.0), torch.tensor(0))}
    )
    assert got["a"] == 0.25
    assert got["n"] != got["n"]
    assert distributed.reduce_ratios({}) == {}


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
