"""What each process is given."""

from types import SimpleNamespace

import pytest
from support import Counting
from transformers import PreTrainedConfig

from lightning_rlvr.training import RLVRDataModule
from lightning_rlvr.types import Sampling, UserError


def held_out(questions, size, world):
    """A data module with held-out questions, as each of the processes has it."""
    modules = [RLVRDataModule(val=Counting(questions), eval_prompts_per_batch=size) for _ in range(world)]
    for rank, data in enumerate(modules):
        data.questions = {"val": Counting(questions).load()}
        data.longest = {"val": 5}
        policy = SimpleNamespace(config=PreTrainedConfig())
        data.trainer = SimpleNamespace(
            world_size=world,
            global_rank=rank,
            lightning_module=SimpleNamespace(policy=policy, eval_sampling=Sampling(4)),
        )
    return modules


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 32])
@pytest.mark.parametrize("questions", [8, 9, 13, 24, 25, 129])
def test_processes_share_out_held_out_questions_in_as_many_batches(questions, size, world):
    shares = [list(data.val_dataloader()) for data in held_out(questions, size, world)]
    assert len(set(map(len, shares))) == 1, "one would wait for another for ever where weights are in parts"
    seen = [prompt.uid for batches in shares for batch in batches for prompt in batch.prompts]
    assert sorted(seen) == sorted(prompt.uid for prompt in Counting(questions).load())
    if world == 1:
        assert max(len(batch.prompts) for batch in shares[0]) <= size


def test_each_process_needs_a_held_out_question():
    (data, *_) = held_out(2, 1, 3)
    module = SimpleNamespace(pass_at=[1])
    with pytest.raises(UserError, match=r"question for each process \(3\), got 2.*data\.val or trainer\.devices"):
        data._check("validate", module)
