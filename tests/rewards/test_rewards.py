import pickle
from dataclasses import replace
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_rlvr.rewards import ExactMatch, FormatMatch, MathAnswer, Part, ReasoningGymScore, WeightedSum
from lightning_rlvr.rewards.cache import BoundedCache
from lightning_rlvr.rewards.extract import TAIL, last_boxed, last_lines, marked_answer
from lightning_rlvr.rewards.reasoning_gym import EXECUTING, TEXTUAL
from lightning_rlvr.rewards.sandbox import Ground, Level, probe
from lightning_rlvr.rewards.sandbox.inside.gym import is_arithmetic
from lightning_rlvr.tasks import ReasoningGym
from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError

needs_isolation = pytest.mark.skipif(probe().level < Level.isolated, reason=f"no isolation: {probe().missing}")
PROMPT = Prompt("u1", "question", "New  York")


def judge(reward, text, prompt=PROMPT):
    return reward([Response(text)], [prompt])[0]


# --- where the answer stands -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{a} \boxed{b}", "b"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {a}", "a"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"} } \boxed{a}", "a"),
        (r"\boxed{x \boxed{y}}", "y"),
        ("#### a\n#### b \n \n", "b"),
        ("#### a\nb", None),
        ("####\nb", None),
        ("b\n#### ", None),
        ("a #### b", "b"),
        ("nothing", None),
        (r"\boxed{a}" + " " * TAIL, None),
    ],
)
def test_marked_answer(text, answer):
    assert marked_answer(text) == answer


def test_last_boxed_does_not_count_cut_off_boxes():
    text = r"\boxed{" + "a" * TAIL + "}"
    assert last_boxed(text) is None
    assert last_boxed(text[-20:]) is None


def test_last_lines_start_where_a_line_starts():
    assert last_lines("abc\ndef", 100) == "abc\ndef"
    assert last_lines("abc\ndef", 5) == "def"
    assert last_lines("abcdef", 3) == "def"
    assert last_lines("abcdef\n", 3) == "ef\n"


# --- exact and format ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text", "status", "answer"),
    [
        ({}, "#### New York ", "correct", "New York"),
        ({}, r"\boxed{New" + "\n" + "York}", "correct", "New York"),
        ({}, "#### new york", "wrong", "new york"),
        ({"ignore_case": True}, "#### NEW YORK", "correct", "new york"),
        ({}, "New York", "unparsable", None),
        ({}, r"\boxed{ }", "unparsable", None),
        ({"answer_pattern": r"A: (.*)"}, "A: Rome\nA: New York", "correct", "New York"),
        ({"answer_pattern": r"A: (.*)"}, "#### New York", "unparsable", None),
        ({"answer_pattern": r"New \w+"}, "New Rome, New York", "correct", "New York"),
        ({"answer_pattern": r"A(: (.*))?"}, "A", "unparsable", None),
        ({"answer_pattern": r"(?s)\A(.*)\Z"}, "New\nYork", "correct", "New York"),
    ],
)
def test_exact_match(arguments, text, status, answer):
    verdict = judge(ExactMatch(**arguments), text)
    assert (verdict.status.value, verdict.answer, verdict.score) == (status, answer, float(status == "correct"))


def test_exact_match_looks_at_the_tail_only():
    assert not judge(ExactMatch("(New York)"), "New York" + "x" * TAIL).correct


def test_exact_match_refuses_an_empty_gold():
    with pytest.raises(UserError, match="'u7'"):
        ExactMatch().check([PROMPT, Prompt("u7", "", " ")])


@pytest.mark.parametrize("gold", ["work #### 5", r"so \boxed{5}"])
def test_exact_match_refuses_a_gold_that_marks_another(gold):
    with pytest.raises(UserError, match=r"'u7': .* '5' .* Set the task's answer_pattern"):
        ExactMatch().check([PROMPT, Prompt("u7", "", gold)])
    ExactMatch(r"A: (.*)").check([Prompt("u7", "", gold)])


@pytest.mark.parametrize(
    ("text", "score"),
    [("<t>\na\n</t>b", 1.0), ("<t>a</t>b ", 0.0), (" <t></t>b", 0.0), ("<t>" + "a" * 100_000 + "</t>b", 0.0)],
)
def test_format_match(text, score):
    verdict = judge(FormatMatch("<t>.*</t>b"), text)
    assert verdict.score == score
    assert verdict.correct == (score == 1.0)


def test_patterns_are_checked():
    for make, key in ((ExactMatch, "answer_pattern"), (FormatMatch, "pattern"), (ReasoningGymScore, "answer_pattern")):
        with pytest.raises(UserError, match=f"init_args.{key}"):
            make("(")
        with pytest.raises(UserError, match=rf"{key} must be a text, got null.*\[#\]"):
            make(None)


# --- weighted sums ---------------------------------------------------------------------------------


class Recorder(Reward):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def check(self, prompts):
        self.calls.append("check")

    def __call__(self, responses, prompts):
        return ExactMatch()(responses, prompts)

    def equivalent(self, pairs):
        return [a[0] == b[0] for a, b in pairs]

    def close(self):
        self.calls.append("close")


def test_the_sum_adds_weighted_scores_and_the_first_part_verifies():
    verifier, form = Recorder(), FormatMatch("a.*")
    reward = WeightedSum({"answer": Part(verifier, 2.0), "form": Part(form, -0.5), "logged": Part(form, 0.0)})
    both, wrong = judge(reward, "a #### New York"), judge(reward, "a #### Rome")
    assert (both.score, both.status, both.answer) == (1.5, Status.CORRECT, "New York")
    assert (wrong.score, wrong.status, wrong.answer) == (-0.5, Status.WRONG, "Rome")
    assert both.parts == {"answer": 1.0, "form": 1.0, "logged": 1.0}
    assert wrong.parts == {"answer": 0.0, "form": 1.0, "logged": 1.0}
    assert reward.equivalent([("ab", "ac"), ("ab", "bb")]) == [True, False]
    reward.check([])
    reward.close()
    assert verifier.calls == ["check", "close"]


def test_sums_are_checked():
    with pytest.raises(UserError, match=r"init_args\.parts"):
        WeightedSum({})
    with pytest.raises(UserError, match="finite"):
        Part(ExactMatch(), float("inf"))


def test_the_yaml_of_the_docstring_parses():
    text = (WeightedSum.__doc__ or "").split("```yaml")[1].split("```")[0]
    config: dict[str, Any] = yaml.safe_load(text)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    parsed = parser.instantiate_classes(parser.parse_object(config)).reward
    assert list(parsed.parts) == ["answer", "format"]
    assert isinstance(parsed.verifier, MathAnswer)
    assert parsed.parts["format"].weight == 0.1
    right = Prompt("u", "", "2")
    verdicts = parsed([Response(r"so \boxed{2}"), Response("#### 2"), Response(r"\boxed{3}")], [right] * 3)
    assert [verdict.score for verdict in verdicts] == [1.1, 1.0, 0.1]
    parsed.close()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MathAnswer", {"workers": 1, "timeout_s": 2, "memory_mb": 600}),
        ("ExactMatch", {"answer_pattern": "(x)", "ignore_case": True}),
        ("FormatMatch", {"pattern": "x"}),
        ("ReasoningGymScore", {}),
        ("CodeTests", {"level": "limited", "workers": 1, "timeout_s": 2, "memory_mb": 600, "prelude": "import math"}),
    ],
)
def test_every_reward_is_chosen_by_class_path(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    choice = {"class_path": f"lightning_rlvr.rewards.{name}", "init_args": arguments}
    reward = parser.instantiate_classes(parser.parse_object({"reward": choice})).reward
    assert type(reward).__name__ == name


# --- reasoning_gym ---------------------------------------------------------------------------------


def gym_prompt(name, **settings):
    from reasoning_gym import create_dataset

    entry = create_dataset(name, size=1, seed=3, **settings)[0]
    return Prompt(f"{name}:3:0", entry["question"], entry["answer"], {"source_dataset": name, "entry": entry})


def test_scores_are_exact():
    prompt = gym_prompt("chain_sum")
    reward = ReasoningGymScore()
    reward.check([prompt])
    texts = [f"#### {prompt.answer}", f"#### {prompt.answer} or so", "#### 0.5", "hm", "#### " + "1" * 5_000]
    found = [judge(reward, text, prompt) for text in texts]
    assert [v.score for v in found] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [v.status.value for v in found] == ["correct", "wrong", "wrong", "unparsable", "unparsable"]
    assert found[0].answer == prompt.answer


def test_the_scorer_of_the_data_set_decides():
    prompt = gym_prompt("word_ladder")
    other = prompt.answer.lower()
    assert other != prompt.answer
    assert judge(ReasoningGymScore(), rf"\boxed{{{other}}}", prompt).correct


def test_a_scorer_that_raises_is_an_error(monkeypatch):
    prompt = gym_prompt("chain_sum")
    reward = ReasoningGymScore()
    reward._scorers["chain_sum", "{}"] = lambda answer, entry: 1 / 0
    assert judge(reward, "#### 3", prompt).status is Status.ERROR


def test_a_scorer_cannot_change_the_entry():
    prompt = gym_prompt("chain_sum")
    reward = ReasoningGymScore()
    reward._scorers["chain_sum", "{}"] = lambda answer, entry: float(entry["metadata"].clear() is None)
    judge(reward, "#### 3", prompt)
    assert prompt.metadata["entry"]["metadata"]


def test_every_scorer_that_executes_text_is_known():
    from reasoning_gym.factory import DATASETS

    assert len(EXECUTING | TEXTUAL | {"puzzle24"}) == 9
    assert set(DATASETS) >= EXECUTING | TEXTUAL


@pytest.mark.parametrize("name", sorted(TEXTUAL))
def test_texts_are_compared_without_their_scorer(name):
    prompt, reward = gym_prompt(name), ReasoningGymScore(r"(?s)\A(.*)\Z")
    reward.check([prompt])
    assert prompt.metadata["entry"]["answer"]
    answer = prompt.metadata["entry"]["answer"]
    assert judge(reward, answer, prompt).correct
    assert judge(reward, f"{answer}1", prompt).status is Status.WRONG
    assert judge(reward, "[exit()]", prompt).status is Status.WRONG


@needs_isolation
def test_evaluating_scorers_run_in_the_sandbox():
    reward = ReasoningGymScore(timeout_s=4.0)  # a second is too short for what is right on a busy machine
    sums, product = gym_prompt("countdown"), gym_prompt("polynomial_multiplication")
    integral = gym_prompt("simple_integration")
    right = [(sums, sums.answer), (product, product.answer), (integral, integral.answer)]
    slow, bad = (integral, "9**9**9**9"), (sums, "().__class__.__base__.__subclasses__()")
    wrong = [(sums, "1 + 1"), (integral, "x"), (product, "exit")]
    items = [*right, slow, bad, (sums, "print(1)"), *wrong, right[0]]
    reward.check([prompt for prompt, _ in items])
    responses = [Response(rf"\boxed{{{answer}}}") for _, answer in items]
    found = [verdict.status.value for verdict in reward(responses, [prompt for prompt, _ in items])]
    assert found == ["correct"] * 3 + ["timeout"] + ["unparsable"] * 2 + ["wrong"] * 3 + ["correct"]


def test_evaluating_scorers_are_refused_where_nothing_is_isolated(monkeypatch):
    monkeypatch.setattr("lightning_rlvr.rewards.sandbox.sandbox.probe", lambda: Ground(Level.limited, "no namespaces"))
    for name in EXECUTING:
        with pytest.raises(UserError, match=r"got 'isolated', and it gives 'limited': no namespaces"):
            ReasoningGymScore().check([gym_prompt(name)])
    with pytest.raises(UserError, match="no namespaces"):
        judge(ReasoningGymScore(), "#### 1", gym_prompt("countdown"))
    ReasoningGymScore().check([gym_prompt("chain_sum")])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1 + 2 * (3 - x) ** 2 / -4 // 5 % 6", True),
        ("sin(x) + log(2, 10)", True),
        ("a.b", False),
        ("a[0]", False),
        ("'a'", False),
        ("f'{1}'", False),
        ("eval(1)", False),
        ("sin(*x)", False),
        ("sin(x=1)", False),
        ("sin(x)(y)", False),
        ("lambda: 0", False),
        ("[x for x in y]", False),
        ("__import__", False),
        ("(x := 1)", False),
        ("1; 2", False),
        ("1 if 2 else 3", False),
        ("(" * 300 + ")" * 300, False),
    ],
)
def test_arithmetic_is_told_from_code(text, plain):
    assert is_arithmetic(text) == plain


@pytest.mark.parametrize("name", ["coin_flip", "game_of_life_halting", "puzzle24"])
def test_scorers_that_accept_wrong_answers_are_refused(name):
    with pytest.raises(UserError, match=rf"'{name}' for question '{name}:3:0': it .*gives full marks.*ExactMatch"):
        ReasoningGymScore().check([gym_prompt(name)])


def test_the_scorer_has_the_settings_of_the_task():
    reward = ReasoningGymScore()
    for places, score in ((2, 1.0), (5, 0.0), (2, 1.0)):
        settings = {"min_num_decimal_places": 2, "max_num_decimal_places": places, "size": 9}
        task = ReasoningGym("decimal_arithmetic", size=1, config=settings)
        prompt = replace(task.load()[0], answer="0.5")
        prompt.metadata["entry"]["answer"] = "0.5"
        reward.check([prompt])
        assert judge(reward, "#### 0.505", prompt).score == score
    assert len(reward._scorers) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"source_dataset": "no_such"},
        {"source_dataset": ["x"]},
        {"source_dataset": "chain_sum"},
        {"source_dataset": "chain_sum", "config": 3},
        {"source_dataset": "chain_sum", "config": {"no_such": 3}},
    ],
)
def test_other_prompts_are_refused(metadata):
    with pytest.raises(UserError, match=r"tasks\.ReasoningGym"):
        ReasoningGymScore().check([Prompt("u9", "", "", metadata)])


def test_pickles_leave_the_data_sets_behind():
    reward = ReasoningGymScore(r"A: (.*)")
    reward.check([gym_prompt("chain_sum")])
    assert pickle.loads(pickle.dumps(reward))._scorers == {}


# --- cache -----------------------------------------------------------------------------------------


def test_the_cache_is_bounded_and_forgets_the_oldest():
    cache = BoundedCache(3)
    for number in range(10):
        cache.put(number, -number)
        cache.get(0)
    assert len(cache) == 3
    assert [cache.get(n) for n in (0, 7, 8, 9)] == [0, None, -8, -9]
    assert len(pickle.loads(pickle.dumps(cache))) == 0


def test_unjudgeable_golds_are_named_by_their_places():
    prompts = [Prompt("a", "", "3"), Prompt("b", "", " "), Prompt("c", "", "so it is\n#### 3"), Prompt("d", "", "4")]
    assert ExactMatch().unjudgeable(prompts) == [1, 2]
    assert ExactMatch(r"(\d)").unjudgeable(prompts) == [1]
    assert FormatMatch(".*").unjudgeable(prompts) == []
    parts = {"format": Part(FormatMatch(".*")), "answer": Part(ExactMatch()), "other": Part(ExactMatch(r"(\d)"))}
    assert WeightedSum(parts).unjudgeable(prompts) == [1, 2]
