"""Faults on one of two ranks: neither waits for ever, and both take the same step or none.

As a script, this file is one of two processes that train together, their gradients averaged as Lightning does it.
"""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_rlvr.types import UserError

ROWS, GROUP = 12, 4


def batch_of(rank):
    """A policy, the rollout batch of a rank, and what `update_policy` reads of both."""
    from support import Counting, TinyPolicy

    from lightning_rlvr.objectives import GRPO
    from lightning_rlvr.rollout import TransformersEngine
    from lightning_rlvr.training.distributed import gather_stats
    from lightning_rlvr.types import Sampling, TokenStats

    policy = TinyPolicy(dtype="float64").load()
    prompts = [policy.tokenizer(p.text)["input_ids"] for p in Counting(ROWS // GROUP, start=10 * rank).load()]
    seeds = [1000 * rank + i for i in range(len(prompts))]
    rollouts = TransformersEngine.of(policy).generate(prompts, seeds, GROUP, Sampling(8))
    stats = TokenStats(
        logp=rollouts.logp,
        entropy=rollouts.entropy,
        advantage=torch.linspace(-1, 1, ROWS, dtype=torch.float64),
        mask=rollouts.mask,
        row_id=torch.arange(ROWS) + rank * ROWS,
        update=torch.zeros(ROWS, dtype=torch.long),
    )
    objective = GRPO()
    whole, mine = gather_stats(stats)
    plan = objective.plan(whole).rows(mine).width(stats.mask.shape[1])
    record = SimpleNamespace(
        experience=SimpleNamespace(rollouts=rollouts), stats=stats, plan=plan, ref_logp=None, number=1
    )
    return policy.model, objective, record


def update(rank, folder, fail_at=None, spoil=False):
    """Take one step; `fail_at` is the micro-batch of rank 1 that finds no memory, `spoil` makes its loss nan."""
    from lightning.pytorch.overrides.distributed import prepare_for_backward
    from torch.nn.parallel import DistributedDataParallel

    from lightning_rlvr.training import numbers
    from lightning_rlvr.training import update as room
    from lightning_rlvr.training.parallel import Parallel

    model, objective, record = batch_of(rank)
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1)
    compute, calls, kept = room.response_loss, [], []

    def faulty(*args, **kwargs):
        calls.append(1)
        if rank == 1 and len(calls) == fail_at:
            raise RuntimeError("std::bad_alloc")
        return compute(*args, **kwargs) * (float("nan") if rank == 1 and spoil else 1.0)

    def backward(loss):
        prepare_for_backward(wrapped, loss)  # as Lightning's strategy does
        loss.backward()

    module = SimpleNamespace(
        policy=model,
        reference=None,
        objective=objective,
        sampling=SimpleNamespace(temperature=1.0),
        micro_batch_size=4,
        max_grad_norm=None,
        max_skipped_updates=3,
        vllm=None,
        skipped_in_a_row=0,
        global_rank=rank,
        optimizers=lambda: optimizer,
        lr_schedulers=lambda: None,
        manual_backward=backward,
        trainer=SimpleNamespace(model=wrapped, default_root_dir=folder),
    )
    module.parallel = Parallel(module)
    room.response_loss, numbers.save_replay = faulty, lambda place, *_: kept.append(place.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metrics = room.update_policy(module, record)[0]
    finally:
        room.response_loss = compute
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "size": module.micro_batch_size,
        "calls": len(calls),
        "skipped": float(metrics["skipped_updates"].numerator),
        "in_a_row": module.skipped_in_a_row,
        "kept": kept,
    }


def other_policy(rank):
    """What the ranks say of a sampler that samples from another policy on rank 1."""
    from support import TinyPolicy

    from lightning_rlvr.training.mismatch import check_agreement

    rollouts = batch_of(rank)[2].experience.rollouts
    try:
        check_agreement(rollouts, rollouts.logp - 0.5 * rank, 0.1, TinyPolicy().tokenizer())
    except UserError as error:
        return str(error)


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out = {
        "well": update(rank, folder),
        "memory": update(rank, folder, fail_at=2),
        "nan": update(rank, folder, spoil=True),
        "other policy": other_policy(rank),
        "start": torch.cat([p.detach().flatten() for p in batch_of(rank)[0].parameters()]),
    }
    torch.save(out, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    from support import two_processes

    folder = tmp_path_factory.mktemp("ranks")
    two_processes(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_a_step_moves_both_ranks_alike(ranks):
    assert torch.equal(ranks[0]["well"]["weights"], ranks[1]["well"]["weights"])
    assert (ranks[0]["well"]["weights"] - ranks[0]["start"]).abs().max() > 1e-4


def test_a_sampler_of_another_policy_on_one_rank_ends_both(ranks):
    for rank in ranks:
        assert "within 0.1 nats" in rank["other policy"]


def test_a_rank_that_finds_no_memory_begins_again_and_both_come_to_the_same_step(ranks):
    assert [rank["memory"]["size"] for rank in ranks] == [4, 2]
    assert ranks[1]["memory"]["calls"] > ranks[1]["well"]["calls"] > 2
    for rank in ranks:
        torch.testing.assert_close(rank["memory"]["weights"], ranks[0]["well"]["weights"], rtol=0, atol=1e-10)


def test_a_loss_that_is_nan_on_one_rank_is_left_out_on_both(ranks):
    for rank in ranks:
        assert (rank["nan"]["skipped"], rank["nan"]["in_a_row"]) == (1.0, 1)
        assert (rank["well"]["skipped"], rank["well"]["in_a_row"]) == (0.0, 0)
        assert torch.equal(rank["nan"]["weights"], rank["start"])
    assert [rank["nan"]["kept"] for rank in ranks] == [["000001"]] * 2  # which is done together


@pytest.mark.parametrize(("world", "refused"), [(1, RuntimeError), (2, UserError)])
def test_where_ranks_exchange_gradients_a_step_is_not_begun_again(monkeypatch, world, refused):
    from lightning_rlvr.training import update as room
    from lightning_rlvr.training.parallel import Parallel

    monkeypatch.setattr(room, "world_size", lambda: world)
    module = SimpleNamespace(parallel=Parallel(None), global_rank=1)
    with pytest.raises(refused), room._exchanging(module, last=True):
        raise RuntimeError("std::bad_alloc")


@pytest.mark.parametrize("kind", ["FullySharded", "ZeRO"])
def test_shards_are_not_begun_again(kind):
    from lightning_rlvr.training import parallel
    from lightning_rlvr.training import update as room

    def work(size):
        raise MemoryError

    with pytest.raises(UserError, match="micro_batch_size 4"):
        room.in_micro_batches(SimpleNamespace(parallel=getattr(parallel, kind)(None), micro_batch_size=4), work)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
