import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.types import Prompt, Reward, Rollouts, Sampling, Status, TokenPlan, TokenStats, UserError, Verdict


def stats(mask, row_id):
    zeros = torch.zeros(mask.shape)
    return TokenStats(zeros, zeros, torch.arange(len(mask)).float(), mask, row_id, torch.zeros_like(row_id))


@st.composite
def layouts(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    bits = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    ids = draw(st.lists(st.integers(-50, 50), min_size=rows, max_size=rows, unique=True))
    return torch.tensor(bits).view(rows, width), torch.tensor(ids)


@given(layouts())
@settings(max_examples=50, deadline=None)
def test_counted_lists_every_counted_token_once_by_row_id_then_position(layout):
    mask, row_id = layout
    rows, width = mask.shape
    tokens = [(int(row_id[i]), t, i * width + t) for i in range(rows) for t in range(width) if mask[i, t]]
    assert stats(mask, row_id).counted().tolist() == [flat for _, _, flat in sorted(tokens)]


@given(layouts(), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_counted_meets_the_same_tokens_whatever_the_layout(layout, padding, random):
    mask, row_id = layout
    order = random.sample(range(len(mask)), len(mask))
    wide = torch.cat([mask, torch.zeros(len(mask), padding, dtype=torch.bool)], dim=1)
    name = row_id[:, None] * 1000 + torch.arange(wide.shape[1])
    before = name[:, : mask.shape[1]].flatten()[stats(mask, row_id).counted()]
    after = name[order].flatten()[stats(wide[order], row_id[order]).counted()]
    assert torch.equal(before, after)


def test_token_advantage_is_that_of_the_row():
    got = stats(torch.ones(2, 3, dtype=torch.bool), torch.tensor([5, 1])).token_advantage()
    assert got.tolist() == [[0.0] * 3, [1.0] * 3]


def rollouts(n=4):
    def grid(width, dtype):
        return (torch.arange(n * width).view(n, width) + 1).to(dtype)

    return Rollouts(
        prompt_ids=grid(2, torch.long),
        prompt_mask=grid(2, torch.bool),
        response_ids=grid(3, torch.long),
        mask=grid(3, torch.bool),
        logp=grid(3, torch.float32),
        entropy=grid(3, torch.float32) * 2,
        truncated=torch.tensor([i % 2 == 0 for i in range(n)]),
    )


def plan(n=4):
    grid = torch.arange(n * 3).view(n, 3)
    return TokenPlan(
        grid * 1.0, grid * 2.0, grid * 3.0, grid % 2 == 0, classes={"low": grid % 3 == 0, "high": grid > 5}
    )


INDICES = [
    torch.tensor([2, 0]),
    torch.tensor([True, False, False, True]),
    slice(1, 3),
    slice(0, 0),
    torch.tensor([1, 1]),
]


@pytest.mark.parametrize("index", INDICES)
def test_rows_of_rollouts_index_every_field(index):
    whole = rollouts()
    part = whole.rows(index)
    for name in vars(whole):
        assert torch.equal(getattr(part, name), getattr(whole, name)[index]), name


@pytest.mark.parametrize("index", INDICES)
def test_rows_of_a_plan_index_every_field_and_class(index):
    whole = plan()
    part = whole.rows(index)
    for name in ("advantage", "weight", "kl_weight", "policy_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[index]), name
    assert list(part.classes) == ["low", "high"]
    for name, chosen in whole.classes.items():
        assert torch.equal(part.classes[name], chosen[index]), name


def test_rows_leave_the_whole_as_it_was():
    whole = plan()
    whole.rows(slice(0, 1))
    assert len(whole.weight) == 4
    assert all(len(chosen) == 4 for chosen in whole.classes.values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_sampling_refuses_by_the_name_of_the_key(key, value):
    with pytest.raises(UserError, match=rf"{key} must be .*got {value}.*sampling\.{key}"):
        Sampling(**{"max_new_tokens": 4, key: value})


def test_sampling_takes_the_ends_of_its_ranges():
    assert Sampling(1, temperature=0.0, top_p=1.0, top_k=0).temperature == 0.0


@pytest.mark.parametrize("status", Status)
def test_only_correct_counts_as_solved_whatever_the_score(status):
    assert Verdict(0.0, status).correct == (status == "correct")
    assert Verdict(1.0, status).correct == (status == "correct")


def test_answers_are_equivalent_by_text_unless_a_reward_knows_better():
    class Constant(Reward):
        def __call__(self, responses, prompts):
            return [Verdict(0.0, Status.WRONG) for _ in responses]

    reward = Constant()
    reward.check([Prompt("u", "q", "a")])
    assert reward.equivalent([("1", "1"), ("1/2", "0.5")]) == [True, False]
    reward.close()


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
