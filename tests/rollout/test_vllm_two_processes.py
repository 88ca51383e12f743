"""vLLM in each of two processes that train together. As a script, this file is one of the two."""

import sys
from pathlib import Path

import pytest
import torch

STRATEGIES = ("ddp", "fsdp2")


def trained(folder, **more):
    """Train with vLLM as the sampler; return whole weights and the last metrics."""
    from support import Sharp, train

    from lightning_rlvr.objectives import GRPO
    from lightning_rlvr.rollout import VLLM

    limits = VLLM(dtype="float32", max_model_len=64, eager=True)
    module, trainer = train(folder, GRPO(), policy=Sharp(), eps=1e-4, vllm=limits, **more)
    return module.parallel.full_state(module.policy), trainer.logged_metrics


def worker(rank, folder):
    for strategy in STRATEGIES:
        result = trained(folder / strategy, strategy=strategy, processes=2)
        if rank == 0:
            torch.save(result, folder / f"{strategy}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from support import two_processes  # not where this file runs as a script

    folder = tmp_path_factory.mktemp("two_processes")
    two_processes(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one_process"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_trains(folder, alone, strategy):
    weights, metrics = torch.load(folder / f"{strategy}.pt")
    for name, weight in alone[0].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=name)
    for key in ("reward", "entropy", "sampler/importance", "grad_norm"):
        assert float(metrics[f"train/{key}"]) == pytest.approx(float(alone[1][f"train/{key}"]), rel=1e-3), key
    assert 0 < float(metrics["train/sampler/gap"]) < 1e-4


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
