import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import Counting, ManyVowels, TinyPolicy

from lightning_rlvr.curriculum.score import (
    NUMBERS,
    Scoring,
    cache_path,
    manifest,
    read_scores,
    recompute,
    score_questions,
)
from lightning_rlvr.models.chat import PromptFormat
from lightning_rlvr.ops.semantic_entropy import cluster_groups, semantic_entropy
from lightning_rlvr.rollout import TransformersEngine
from lightning_rlvr.store import Store
from lightning_rlvr.types import Prompt, Response, Status, UserError, Verdict

COLUMNS = [
    "uid",
    "question",
    "gold",
    "semantic_entropy_discrete",
    "semantic_entropy_rao_blackwell",
    "semantic_entropy_likelihood",
    "clusters",
    "majority",
    "majority_correct",
    "pass_rate",
    "mean_token_entropy",
    "mean_length",
    "truncated",
    "unparsable",
    "answers",
    "cluster",
    "correct",
    "logp",
    "length",
]
LISTS = COLUMNS[-5:]
SCORING = Scoring(samples=5, prompts_per_batch=3)
MAX_NEW_TOKENS = 10
ABOUT = {"made": "here"}


class VowelsUpToThree(ManyVowels):
    """Finds no answer in a response without vowels; 1 and 2 vowels mean the same."""

    def _judge(self, text):
        verdict = super()._judge(text)
        return replace(verdict, status=Status.UNPARSABLE, answer=None) if verdict.answer == "0" else verdict

    def equivalent(self, pairs):
        return [{a, b} == {"1", "2"} for a, b in pairs]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Score questions by the tiny policy in float64; keyword arguments replace what is used."""
    policy = TinyPolicy(0, "float64").load()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(15)
    engine = TransformersEngine(policy.model, range(1, 20), pad_id=0)

    def decode(rollouts):
        return [
            Response(policy.tokenizer.decode(ids[mask], skip_special_tokens=True), bool(truncated))
            for ids, mask, truncated in zip(rollouts.response_ids, rollouts.mask, rollouts.truncated, strict=True)
        ]

    def score(prompts=None, reward=None, scoring=SCORING, seed=0, path=None, ranks=(0,), world=1):
        path = path or tmp_path_factory.mktemp("scores") / "scores.parquet"
        prompts = Counting(7).load() if prompts is None else prompts
        done = Store(path, ABOUT).done()
        for rank in ranks:
            score_part(prompts, reward, scoring, seed, Store(path, ABOUT, rank=rank), done, world)
        Store(path, ABOUT).finish([prompt.uid for prompt in prompts])
        return lists(pd.read_parquet(path))

    def score_part(prompts, reward, scoring, seed, store, done, world):
        score_questions(
            prompts,
            lambda text: PromptFormat().encode(policy.tokenizer, text),
            decode,
            engine,
            reward or VowelsUpToThree(),
            replace(scoring, seed=seed),
            MAX_NEW_TOKENS,
            store,
            done,
            world,
        )

    return score


def lists(table):
    """What is a list in a record is an array in what parquet gives back."""
    return table.assign(**{column: table[column].map(list) for column in LISTS})


@pytest.fixture(scope="module")
def scores(run):
    return run()


def assert_same(got, expected):
    """Equal, but for a rounding in what is recorded in float32."""
    pd.testing.assert_frame_equal(got.reset_index(drop=True), expected.reset_index(drop=True), rtol=1e-5, atol=1e-6)


# --- scores ----------------------------------------------------------------------------------------


def test_one_row_a_question_in_the_order_given(scores):
    assert list(scores.columns) == COLUMNS
    assert scores["uid"].tolist() == [f"count:{i}" for i in range(7)]
    assert scores["question"].tolist() == [f"{i}=" for i in range(7)]
    assert scores["gold"].tolist() == [str(i) for i in range(7)]
    assert set(NUMBERS) < set(COLUMNS)
    for column in LISTS:
        assert scores[column].map(len).tolist() == [5] * 7


def test_entropies_follow_from_the_samples_stored_beside_them(scores):
    together = VowelsUpToThree()
    for row in scores.to_dict("records"):
        labels = cluster_groups([row["answers"]], together.equivalent)[0]
        assert row["cluster"] == labels
        assert row["clusters"] == len(set(labels))
        masses = {
            "discrete": [1.0] * 5,
            "rao_blackwell": [math.exp(x / n) for x, n in zip(row["logp"], row["length"], strict=True)],
            "likelihood": [math.exp(x) for x in row["logp"]],
        }
        for name, mass in masses.items():
            p = [sum(m for m, k in zip(mass, labels, strict=True) if k == c) / sum(mass) for c in set(labels)]
            expected = -sum(q * math.log(q) for q in p)
            assert row[f"semantic_entropy_{name}"] == pytest.approx(expected, abs=1e-12)
            logp, length = torch.tensor(row["logp"], dtype=torch.float64), torch.tensor(row["length"])
            assert row[f"semantic_entropy_{name}"] == semantic_entropy(torch.tensor(labels), logp, length, name)
    assert scores["semantic_entropy_discrete"].nunique() > 2
    assert scores["clusters"].min() < scores["clusters"].max()


def test_rates_and_counts_follow_from_the_samples(scores):
    for row in scores.to_dict("records"):
        assert row["unparsable"] == row["answers"].count(None)
        assert row["pass_rate"] == row["correct"].count(True) / 5
        assert row["mean_length"] == sum(row["length"]) / 5
        assert 0 <= row["truncated"] <= row["length"].count(MAX_NEW_TOKENS)
        assert all(1 <= n <= MAX_NEW_TOKENS for n in row["length"])
        # an unparsable answer is not correct, whatever its score
        assert not any(ok for ok, answer in zip(row["correct"], row["answers"], strict=True) if answer is None)
        assert 0 < row["mean_token_entropy"] < math.log(98)
        assert all(x < 0 for x in row["logp"])
    assert 0 < scores["unparsable"].sum() < 35
    assert 0 < scores["truncated"].sum() < 35


def test_the_majority_is_the_most_frequent_parsed_answer(scores):
    for row in scores.to_dict("records"):
        parsed = [k for k, answer in zip(row["cluster"], row["answers"], strict=True) if answer is not None]
        most = max(parsed, key=parsed.count, default=None)
        assert row["majority"] == parsed.count(most) / 5
        assert row["majority_correct"] == (most is not None and row["correct"][row["cluster"].index(most)])
    assert scores["majority_correct"].nunique() == 2


def test_without_a_parsed_answer_there_is_no_majority(run):
    class Silent(ManyVowels):
        def _judge(self, text):
            return Verdict(0.0, Status.UNPARSABLE)

    got = run(reward=Silent())
    assert got["majority"].tolist() == [0.0] * 7
    assert not got["majority_correct"].any()
    assert got["clusters"].tolist() == [5] * 7
    assert recompute(got, "one_cluster")["semantic_entropy_likelihood"].tolist() == [0.0] * 7


def test_unparsable_answers_may_be_one_cluster_without_sampling_again(scores):
    got = recompute(scores, "one_cluster")
    assert got["answers"].tolist() == scores["answers"].tolist()
    extra = (scores["unparsable"] - 1).clip(lower=0)
    assert extra.max() > 0
    assert (scores["clusters"] - got["clusters"]).tolist() == extra.tolist()
    for row in got.to_dict("records"):
        assert row["cluster"] == cluster_groups([row["answers"]], VowelsUpToThree().equivalent, "one_cluster")[0]
        logp, length = torch.tensor(row["logp"], dtype=torch.float64), torch.tensor(row["length"])
        for name in ("discrete", "rao_blackwell", "likelihood"):
            expected = semantic_entropy(torch.tensor(row["cluster"]), logp, length, name)
            assert row[f"semantic_entropy_{name}"] == expected
    pd.testing.assert_frame_equal(recompute(got, "own_cluster_each"), scores)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours runs after it."""


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (1, 0)])
def test_interrupted_and_shared_out_it_is_the_same_file(run, tmp_path, ranks):
    run(path=tmp_path / "whole.parquet")
    left = [1, 1]

    class Mortal(VowelsUpToThree):
        def __call__(self, responses, prompts):
            if left[0] == 0:
                left[0] = left.pop() if len(left) > 1 else 99
                raise Killed
            left[0] -= 1
            return super().__call__(responses, prompts)

    path, kills = tmp_path / "parts.parquet", 0
    while not path.exists():
        try:
            run(path=path, reward=Mortal(), ranks=ranks, world=len(ranks))
        except Killed:
            kills += 1
    assert kills == 2
    assert path.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_no_question_is_sampled_twice(run, tmp_path):
    asked = []

    class Asked(VowelsUpToThree):
        def __call__(self, responses, prompts):
            asked.extend(prompt.uid for prompt in prompts[::5])
            if len(asked) == 6:
                raise Killed
            return super().__call__(responses, prompts)

    with pytest.raises(Killed):
        run(path=tmp_path / "a.parquet", reward=Asked())
    run(path=tmp_path / "a.parquet", reward=Asked())
    assert asked == [f"count:{i}" for i in (0, 1, 2, 3, 4, 5, 3, 4, 5, 6)]  # the batch under way is done anew


def test_the_same_again(run, scores):
    torch.manual_seed(5)
    pd.testing.assert_frame_equal(run(), scores)


def test_another_seed_samples_anew(run, scores):
    assert run(seed=1)["logp"].tolist() != scores["logp"].tolist()


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_prompts_per_batch_changes_no_score(run, scores, size):
    assert_same(run(scoring=replace(SCORING, prompts_per_batch=size)), scores)


def test_the_order_of_questions_changes_no_score(run, scores):
    order = [4, 0, 6, 2, 1, 5, 3]
    questions = Counting(7).load()
    assert_same(run([questions[i] for i in order]), scores.iloc[order])


def test_a_score_depends_on_the_uid_and_the_text(run, scores):
    question = Counting(1).load()[0]
    assert_same(run([question]), scores.iloc[:1])
    assert run([replace(question, uid="other")])["logp"].tolist() != scores["logp"][:1].tolist()
    assert run([replace(question, text="9+9=")])["logp"].tolist() != scores["logp"][:1].tolist()


def test_temperature_reaches_the_sampling(run):
    cold, hot = (run(scoring=replace(SCORING, temperature=t))["mean_token_entropy"].mean() for t in (0.2, 3.0))
    assert cold < 1.0
    assert hot > 3.5


def test_the_reward_is_asked_about_the_question_of_each_response(run):
    asked = []

    class Asked(ManyVowels):
        def __call__(self, responses, prompts):
            assert len(responses) == len(prompts)
            asked.extend(prompt.uid for prompt in prompts)
            return [Verdict(1.0, Status.CORRECT, "1") for _ in prompts]

    got = run(reward=Asked())
    assert asked == [f"count:{i}" for i in range(7) for _ in range(5)]
    assert got["pass_rate"].tolist() == [1.0] * 7
    for column in ("semantic_entropy_discrete", "semantic_entropy_rao_blackwell", "semantic_entropy_likelihood"):
        assert got[column].tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("key", "value"), [("samples", 1), ("prompts_per_batch", 0), ("temperature", 0.0), ("temperature", -1.0)]
)
def test_bad_settings_name_the_key(key, value):
    with pytest.raises(UserError, match=rf"^{key} must be .*{value}.* Set data\.scoring\.{key}\.$"):
        Scoring(**{key: value})


# --- manifest and cache ----------------------------------------------------------------------------


def about(**changes):
    prompts = changes.pop("prompts", Counting(7).load())
    scoring = changes.pop("scoring", SCORING)
    settings = {
        "policy": "tiny",
        "prompt_format": "PromptFormat()",
        "reward": "ManyVowels()",
        "precision": "32-true",
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    encode = changes.pop("encode", lambda text: [ord(c) for c in text])
    return manifest(prompts, encode, scoring=scoring, **{**settings, **changes})


DIFFERENT = [
    {"policy": "other"},
    {"prompt_format": "PromptFormat(system='a')"},
    {"reward": "Exact()"},
    {"max_new_tokens": 11},
    {"scoring": replace(SCORING, seed=2)},
    {"precision": "bf16-true"},
    {"scoring": replace(SCORING, samples=6)},
    {"scoring": replace(SCORING, temperature=0.9)},
    {"encode": lambda text: [ord(c) + 1 for c in text]},
    {"prompts": Counting(8).load()},
    {"prompts": Counting(7, start=1).load()},
    {"prompts": Counting(7).load()[::-1]},
    {"prompts": [*Counting(6).load(), Prompt("count:6", "6=", "another answer")]},
    {"prompts": [*Counting(6).load(), Prompt("count:6", "another text", "6")]},
    {"prompts": [*Counting(6).load(), Prompt("count:6", "6=", "6", {"alternatives": ["six"]})]},
]


def test_the_cache_has_a_place_for_each_manifest(tmp_path):
    paths = [cache_path(tmp_path, about(**changes)) for changes in [{}, *DIFFERENT]]
    assert len(set(paths)) == len(paths)
    assert {path.parent for path in paths} == {tmp_path}


def test_what_changes_no_score_changes_no_place(tmp_path):
    same = about(scoring=replace(SCORING, prompts_per_batch=99, file="somewhere.parquet", unparsable="one_cluster"))
    assert same == about()
    assert cache_path(tmp_path, same) == cache_path(tmp_path, about())
    assert cache_path(tmp_path, dict(reversed(about().items()))) == cache_path(tmp_path, about())


# --- files -----------------------------------------------------------------------------------------


def write(scores, path, manifest):
    store = Store(path, manifest)
    store.append(scores.to_dict("records"))
    store.finish(scores["uid"].tolist())


def test_round_trip(tmp_path, scores):
    path = tmp_path / "deep" / "down" / "scores.parquet"
    write(scores, path, about())
    pd.testing.assert_frame_equal(lists(read_scores(path, about(), "own_cluster_each", "data.scoring.file")), scores)
    one = read_scores(path, about(), "one_cluster", "data.scoring.file")
    pd.testing.assert_frame_equal(one, recompute(scores, "one_cluster"))


def test_scores_can_be_read_by_others(tmp_path, scores):
    path = tmp_path / "scores.parquet"
    write(scores, path, about())
    assert pd.read_parquet(path)["uid"].tolist() == scores["uid"].tolist()
    assert json.loads(pq.read_schema(path).metadata[b"manifest"]) == about()


@pytest.mark.parametrize("changes", DIFFERENT, ids=lambda x: next(iter(x)))
def test_scores_of_something_else_are_refused_and_the_difference_is_named(tmp_path, scores, changes):
    path = tmp_path / "scores.parquet"
    write(scores, path, about())
    wanted = about(**changes)
    with pytest.raises(UserError, match="made for something else") as caught:
        read_scores(path, wanted, "own_cluster_each", "data.scoring.file")
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    stored = about()
    assert lines == [
        f"{key}: the file has {stored[key]!r}, this run {wanted[key]!r}" for key in wanted if stored[key] != wanted[key]
    ]
    assert lines
    assert str(path) in str(caught.value)


def test_a_parquet_file_that_holds_no_scores_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": np.arange(3)}), path)
    with pytest.raises(UserError, match=r"cannot read .*other\.parquet"):
        read_scores(path, about(), "own_cluster_each", "data.scoring.file")


@pytest.mark.parametrize("content", [None, b"", b"uid,score\n1,2\n", b"PAR1 nothing else PAR1"])
def test_what_is_missing_or_no_parquet_file_is_refused(tmp_path, content):
    path = tmp_path / "scores.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*scores\.parquet.*Set data\.scoring\.file"):
        read_scores(path, about(), "own_cluster_each", "data.scoring.file")


def test_mixed_precision_scores_with_the_weights_as_they_are():
    assert about(precision="bf16-mixed") == about(precision="32-true") == about()


def test_an_answer_that_utf8_cannot_write_is_scored(run):
    class Half(ManyVowels):
        def _judge(self, text):
            return Verdict(0.0, Status.WRONG, "\ud800")

    assert run(reward=Half())["answers"].tolist() == [["?"] * 5] * 7
