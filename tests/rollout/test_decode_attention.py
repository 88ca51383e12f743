"""The kernel of decoding steps, run by Triton's interpreter: what it computes, not that a GPU can run it."""

import pytest
import torch
from attention import attended, problem

from lightning_rlvr.rollout import decode_attention

pytest.importorskip("triton", reason="needs Triton: pip install triton")
SCALING, STEP = 0.3, 70


@pytest.mark.parametrize("programs", [1, 1000], ids=["alone", "shared"])
@pytest.mark.parametrize(
    "sizes",
    [(5, 4, 2, 16, 3, 70, 40), (5, 12, 2, 24, 3, 10, 100), (3, 6, 6, 32, 2, 130, 9), (4, 8, 1, 64, 3, 33, 150)],
    ids=str,
)
def test_a_row_attends_to_its_prompt_and_its_columns(sizes, programs, monkeypatch):
    monkeypatch.setattr(decode_attention, "PROGRAMS", programs)
    query, layer, seen = problem(*sizes, STEP)
    got = decode_attention.attend(query, layer, seen, SCALING)
    torch.testing.assert_close(got, attended(query, layer, seen, SCALING), rtol=1e-5, atol=1e-5)
    assert not got[-1].any()


def test_what_no_row_sees_is_not_looked_at():
    query, layer, seen = problem(5, 4, 2, 16, 3, 70, 40, STEP)
    before = decode_attention.attend(query, layer, seen, SCALING)
    for row in range(6):
        columns = torch.arange(int(seen.start[row]), STEP + 1) % 40 if row < 4 else torch.tensor([], dtype=torch.long)
        other = torch.ones(40, dtype=torch.bool).index_fill(0, columns, False)
        layer.own_keys[row][:, other] = layer.own_values[row][:, other] = torch.nan
    for group in range(3):
        first = int(seen.prompt[:4][seen.group[:4] == group].min()) if (seen.group[:4] == group).any() else 70
        layer.prompt_keys[group, :, :first] = layer.prompt_values[group, :, :first] = torch.nan
    assert torch.equal(decode_attention.attend(query, layer, seen, SCALING), before)
