"""A random rollout batch as plain Python lists, for the loops, and as tensors, for the code."""

import random
from types import SimpleNamespace

import pytest
import torch

from lightning_rlvr.types import TokenBatch, TokenStats


def random_batch(seed, rows=7, width=5, updates=3):
    """Ragged rows (one empty), few distinct entropies, repeated (logp, advantage) pairs, nan where masked."""
    rng = random.Random(seed)
    nan = float("nan")
    lengths = [0, *(rng.randint(1, width) for _ in range(rows - 1))]
    rng.shuffle(lengths)
    mask = [[t < length for t in range(width)] for length in lengths]

    def grid(draw):
        return [[draw() if counts else nan for counts in row] for row in mask]

    old_logp = grid(lambda: -rng.choice([0.1, 0.7, 1.3, 2.9]))
    batch = SimpleNamespace(
        mask=mask,
        old_logp=old_logp,
        logp=[[x + rng.uniform(-0.6, 0.6) for x in row] for row in old_logp],
        ref_logp=[[x + rng.uniform(-1.5, 1.5) for x in row] for row in old_logp],
        entropy=grid(lambda: rng.choice([0.0, 0.25, 0.6, 1.1])),
        advantage=[rng.choice([0.0, rng.gauss(0, 1), rng.gauss(0, 1)]) for _ in range(rows)],
        row_id=rng.sample(range(-50, 1000), rows),
        update=[rng.randrange(updates) * 4 for _ in range(rows)],
    )
    batch.tokens = [(i, t) for i in range(rows) for t in range(width) if mask[i][t]]
    batch.stats = TokenStats(
        logp=torch.tensor(batch.old_logp, dtype=torch.float64),
        entropy=torch.tensor(batch.entropy, dtype=torch.float64),
        advantage=torch.tensor(batch.advantage, dtype=torch.float64),
        mask=torch.tensor(mask),
        row_id=torch.tensor(batch.row_id),
        update=torch.tensor(batch.update),
    )
    batch.token_batch = TokenBatch(
        logp=torch.tensor(batch.logp, dtype=torch.float64, requires_grad=True),
        old_logp=torch.tensor(batch.old_logp, dtype=torch.float64),
        mask=torch.tensor(mask),
        ref_logp=torch.tensor(batch.ref_logp, dtype=torch.float64),
    )
    return batch


@pytest.fixture(params=range(5), ids="seed{}".format)
def batch(request):
    return random_batch(request.param)
