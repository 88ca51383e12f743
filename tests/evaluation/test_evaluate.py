"""Sampling, judging and measuring a tiny policy: what is kept, resumed, refused and made anew."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support import Nameless, TinyPolicy

from lightning_rlvr.evaluation import command, evaluate
from lightning_rlvr.evaluation import sample as sampling_module
from lightning_rlvr.evaluation.judge import _judge, judging_manifest
from lightning_rlvr.models import Policy, PromptFormat
from lightning_rlvr.rewards import MathAnswer, Part, WeightedSum
from lightning_rlvr.rollout import TransformersEngine, seed_of
from lightning_rlvr.store import Store, read_manifest
from lightning_rlvr.types import Prompt, Sampling, UserError

SETTINGS = {"samples": 4, "sampling": Sampling(max_new_tokens=6), "ks": [1, 2], "resamples": 50, "prompts_per_batch": 2}


@pytest.fixture
def benchmarks(tmp_path):
    """Two benchmark files: 7 and 3 numbers to name."""
    return [benchmark(tmp_path, name, size) for name, size in (("seven", 7), ("three", 3))]


def benchmark(folder, name, size, reward="lightning_rlvr.rewards.ExactMatch", start=0, **settings):
    file = folder / f"{name}.yaml"
    rows = [{"question": f"{i}=", "answer": str(i)} for i in range(start, start + size)]
    (folder / f"{name}.json").write_text(json.dumps(rows))
    task = {"class_path": "lightning_rlvr.tasks.Files", "init_args": {"path": str(folder / f"{name}.json")}}
    text = yaml.safe_dump({"name": name, "task": task, "reward": {"class_path": reward, "init_args": settings}})
    file.write_text(text)
    return str(file)


@pytest.fixture
def vowels(tmp_path):
    """A benchmark whose reward random text earns now and then: its last letter decides."""
    return benchmark(tmp_path, "vowels", 6, answer_pattern="[a-z0-9]")


def files(folder):
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".parquet", ".json", ".md", ".csv"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_what_is_kept_of_each_problem(tmp_path, benchmarks):
    source = TinyPolicy()
    evaluate(tmp_path / "out", {"tiny": source}, benchmarks, **SETTINGS)
    samples = pd.read_parquet(tmp_path / "out" / "samples" / "tiny" / "seven.parquet")
    verdicts = pd.read_parquet(tmp_path / "out" / "verdicts" / "tiny" / "seven.parquet")
    assert samples["uid"].tolist() == verdicts["uid"].tolist() == [f"seven:{i}" for i in range(7)]
    row = samples.iloc[4]
    policy = source.load()
    engine = TransformersEngine.of(policy)
    ids = list(policy.tokenizer("4=")["input_ids"])
    rollouts = engine.generate([ids], [seed_of(1, "evaluate", "seven:4")], 4, SETTINGS["sampling"])
    assert row["prompt"] == "4="
    assert row["response"].tolist() == [r.text for r in policy.decode(rollouts)]
    assert row["tokens"].tolist() == rollouts.mask.sum(1).tolist()
    assert row["truncated"].tolist() == rollouts.truncated.tolist()
    assert row["logp"].tolist() == pytest.approx(rollouts.logp.sum(1).tolist(), abs=1e-4)
    entropy = rollouts.entropy.sum(1) / rollouts.mask.sum(1)
    assert row["entropy"].tolist() == pytest.approx(entropy.tolist(), abs=1e-4)
    about = read_manifest(tmp_path / "out" / "samples" / "tiny" / "seven.parquet")
    assert about["policy"] == source.fingerprint()
    assert (about["samples"], about["max_new_tokens"], about["seed"], about["questions"]) == (4, 6, 1, 7)
    assert "ExactMatch" in read_manifest(tmp_path / "out" / "verdicts" / "tiny" / "seven.parquet")["reward"]


def test_the_cut_into_batches_does_not_matter(tmp_path, benchmarks):
    for size in (1, 3, 100):
        evaluate(tmp_path / str(size), {"t": TinyPolicy()}, benchmarks, **{**SETTINGS, "prompts_per_batch": size})
    first, *others = (pd.read_parquet(tmp_path / str(size) / "samples" / "t" / "seven.parquet") for size in (1, 3, 100))
    for other in others:
        pd.testing.assert_frame_equal(first, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_an_interrupted_evaluation_continues_to_the_same_files(tmp_path, benchmarks, monkeypatch, stop_after):
    models = {"one": TinyPolicy(0), "two": TinyPolicy(1)}
    evaluate(tmp_path / "whole", models, benchmarks, **SETTINGS)

    appended, append = [], Store.append

    def dies(self, records):
        if len(appended) == stop_after:
            raise KeyboardInterrupt
        appended.extend([None])
        append(self, records)

    monkeypatch.setattr(Store, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "cut", models, benchmarks, **SETTINGS)
    monkeypatch.setattr(Store, "append", append)
    assert not (tmp_path / "cut" / "results.json").exists()
    evaluate(tmp_path / "cut", models, benchmarks, **SETTINGS)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_nothing_finished_is_sampled_or_judged_again(tmp_path, benchmarks, monkeypatch):
    evaluate(tmp_path, {"t": TinyPolicy()}, benchmarks, **SETTINGS)
    before = files(tmp_path)
    monkeypatch.setattr(Store, "append", None)
    monkeypatch.setattr(TinyPolicy, "load", None)
    evaluate(tmp_path, {"t": TinyPolicy()}, benchmarks, **SETTINGS)
    assert files(tmp_path) == before


def test_a_model_more_is_added(tmp_path, benchmarks, monkeypatch):
    evaluate(tmp_path, {"t": TinyPolicy()}, benchmarks, **SETTINGS)
    before = (tmp_path / "samples" / "t" / "seven.parquet").stat().st_mtime_ns
    report = evaluate(tmp_path, {"t": TinyPolicy(), "u/1": TinyPolicy(1)}, benchmarks, **SETTINGS)
    assert (tmp_path / "samples" / "t" / "seven.parquet").stat().st_mtime_ns == before
    assert (tmp_path / "samples" / "u%2F1" / "seven.parquet").is_file()
    assert list(report.differences) == ["u/1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 2}, "seed: the file has 1, this run 2"),
        ({"sampling": Sampling(6, top_p=0.9)}, "top_p: the file has 1.0, this run 0.9"),
        ({"samples": 2}, "samples: the file has 4, this run 2"),
        ({"models": {"t": TinyPolicy(5)}}, "policy: the file has 'tiny-0-float32', this run 'tiny-5-float32'"),
    ],
)
def test_a_folder_of_other_samples_is_refused_saying_what_differs(tmp_path, benchmarks, change, said):
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, benchmarks, **SETTINGS)
    before = files(tmp_path / "o")
    with pytest.raises(UserError, match=said):
        evaluate(tmp_path / "o", **{"models": {"t": TinyPolicy()}, "benchmarks": benchmarks, **SETTINGS, **change})
    assert files(tmp_path / "o") == before


def test_other_questions_are_refused(tmp_path, benchmarks):
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, benchmarks, **SETTINGS)
    benchmark(tmp_path, "seven", 7, start=1)
    with pytest.raises(UserError, match="texts: the file has"):
        evaluate(tmp_path / "o", {"t": TinyPolicy()}, benchmarks, **SETTINGS)
    with pytest.raises(UserError, match=r"must hold responses to the questions of benchmark 'seven'"):
        evaluate(tmp_path / "o", None, benchmarks, **SETTINGS)


def test_measured_anew_without_model_or_data(tmp_path, vowels, monkeypatch):
    evaluate(tmp_path / "o", {"b": TinyPolicy(), "a": TinyPolicy(1)}, [vowels], **SETTINGS)
    before = files(tmp_path / "o")
    (tmp_path / "vowels.json").unlink()
    Path(vowels).unlink()
    (tmp_path / "o" / "table.md").unlink()
    evaluate(tmp_path / "o", **SETTINGS)
    assert files(tmp_path / "o") == before
    report = evaluate(tmp_path / "o", **{**SETTINGS, "ks": [4]})
    assert report.models == ["b", "a"]
    assert report.measures == ["pass@4", "avg@4", "maj@4"]


def test_another_reward_judges_the_same_responses_anew(tmp_path, vowels):
    first = evaluate(tmp_path / "o", {"t": TinyPolicy()}, [vowels], **SETTINGS)
    samples = files(tmp_path / "o" / "samples")
    assert first.responses["t"]["vowels"]["unparsable"] < 1
    benchmark(tmp_path, "vowels", 6, answer_pattern="never found in any response")
    second = evaluate(tmp_path / "o", None, [vowels], **SETTINGS)
    assert second.responses["t"]["vowels"]["unparsable"] == 1
    assert files(tmp_path / "o" / "samples") == samples
    assert "never found" in read_manifest(tmp_path / "o" / "verdicts" / "t" / "vowels.parquet")["reward"]
    benchmark(tmp_path, "vowels", 6, answer_pattern="[a-z0-9]")
    assert evaluate(tmp_path / "o", None, [vowels], **SETTINGS) == first


def test_other_golds_are_judged_anew_but_not_sampled(tmp_path, vowels, monkeypatch):
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, [vowels], **SETTINGS)
    rows = [{"question": f"{i}=", "answer": "e"} for i in range(6)]
    (tmp_path / "vowels.json").write_text(json.dumps(rows))
    monkeypatch.setattr(TinyPolicy, "load", None)
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, [vowels], **SETTINGS)
    verdicts = pd.read_parquet(tmp_path / "o" / "verdicts" / "t" / "vowels.parquet")
    assert set(verdicts["gold"]) == {"e"}
    assert all(
        (status == "correct") == (answer == "e")
        for row in verdicts.itertuples()
        for status, answer in zip(row.status, row.answer, strict=True)
    )


def test_one_benchmark_judged_anew_leaves_the_others_in_the_results(tmp_path, benchmarks, vowels):
    first = evaluate(tmp_path / "o", {"t": TinyPolicy()}, [*benchmarks, vowels], **SETTINGS)
    benchmark(tmp_path, "vowels", 6, answer_pattern="never found in any response")
    second = evaluate(tmp_path / "o", None, [vowels], **SETTINGS)
    assert list(second.problems) == list(first.problems) == ["seven", "three", "vowels"]
    assert second.responses["t"]["seven"] == first.responses["t"]["seven"]
    assert second.responses["t"]["vowels"] != first.responses["t"]["vowels"]
    assert evaluate(tmp_path / "o", **SETTINGS) == second


def test_the_settings_of_a_folder_are_not_those_of_other_models(tmp_path, benchmarks, capsys):
    """They are of what is measured or judged anew; a command with models has those that --help shows."""
    sampling = {"samples": 4, "sampling.max_new_tokens": 6, "ks": [1, 2], "level": 0.5, "resamples": 50, "seed": 3}
    output = f"--output={tmp_path / 'o'}"
    models = ["--models", json.dumps({"t": "support.TinyPolicy"}), "--benchmarks", json.dumps(benchmarks)]
    command.main([output, *models, *(f"--{key}={value}" for key, value in sampling.items())])
    before = files(tmp_path / "o")
    for again in ([], models[2:]):
        command.main([output, *again])
        assert files(tmp_path / "o") == before
    with pytest.raises(UserError, match=r"samples: the file has 4, this run 32"):
        command.main([output, *models])
    with pytest.raises(UserError, match=r"samples: the file has 4, this run 32"):
        command.main([output, "--models.t", "support.TinyPolicy", *models[2:]])


def test_verdicts_on_other_responses_are_not_measured(tmp_path, vowels):
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, [vowels], **SETTINGS)
    evaluate(tmp_path / "p", {"t": TinyPolicy()}, [vowels], **{**SETTINGS, "seed": 2})
    (tmp_path / "p" / "samples" / "t" / "vowels.parquet").replace(tmp_path / "o" / "samples" / "t" / "vowels.parquet")
    with pytest.raises(UserError, match="have changed since"):
        evaluate(tmp_path / "o", **SETTINGS)
    changed = evaluate(tmp_path / "o", None, [vowels], **SETTINGS)
    assert changed.manifests["t"]["vowels"]["samples"]["seed"] == 2


def test_clusters_are_by_meaning_and_the_unparsable_do_not_vote():
    texts = [r"\boxed{1/2}", "no idea, sorry", r"\boxed{0.5}", r"\boxed{3}", ""]
    samples = pd.DataFrame({"response": [texts], "truncated": [[False] * 5], "tokens": [[3] * 5]})
    reward = MathAnswer(workers=1)
    (record,) = _judge(reward, [Prompt("u", "q", "3")], samples)
    reward.close()
    assert record["cluster"] == [0, -1, 0, 2, -1]
    assert record["status"] == ["wrong", "unparsable", "wrong", "correct", "unparsable"]
    assert record["answer"] == ["1/2", None, "0.5", "3", None]
    assert (record["gold"], record["score"]) == ("3", [0, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ks": [8]}, r"ks must be numbers in \[1, samples\], got \[8\] with 4 samples"),
        ({"benchmarks": None}, "models need benchmarks"),
        ({"benchmarks": ["none.yaml"]}, "no such file"),
        ({"models": {}}, "models must be at least one"),
        ({"models": {"../x": TinyPolicy()}}, "does not begin with a dot"),
        ({"models": {"t": "some.ckpt"}}, "a checkpoint must be a file"),
        ({"models": {"t": "no/such/model"}}, "model 't': name must be"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"seed": 2**63}, "seed must be 0 or more, in 63 bits"),
        ({"prompt_format": PromptFormat(system="Hi.")}, "model 't': a system message"),
        ({"level": 2.0}, "level must be in"),
        ({"device": "cuda:77"}, "device must be one that this machine has"),
        ({"models": None}, "output must be the folder of a finished evaluation"),
        ({"models": None, "benchmarks": None}, "output must be the folder of a finished evaluation"),
    ],
)
def test_errors_come_before_any_work(tmp_path, benchmarks, monkeypatch, change, said):
    monkeypatch.setattr(sampling_module, "_respond", None)
    monkeypatch.setattr(TinyPolicy, "load", None)
    with pytest.raises(UserError, match=said):
        evaluate(tmp_path / "o", **{"models": {"t": TinyPolicy()}, "benchmarks": benchmarks, **SETTINGS, **change})


def test_a_reward_that_does_not_show_its_settings_is_found_before_any_work(tmp_path, monkeypatch):
    nested = {"answer": {"reward": {"class_path": "support.Nameless"}}}
    file = benchmark(tmp_path, "nested", 2, reward="lightning_rlvr.rewards.WeightedSum", parts=nested)
    monkeypatch.setattr(TinyPolicy, "load", None)
    with pytest.raises(UserError, match=r"WeightedSum must have a __repr__ .*Nameless object at .*benchmark 'nested'"):
        evaluate(tmp_path / "o", {"t": TinyPolicy()}, [file], **SETTINGS)
    with pytest.raises(UserError, match="__repr__"):
        judging_manifest(WeightedSum({"answer": Part(Nameless())}), [], Path(file))


def test_golds_that_cannot_be_judged_are_found_before_any_work(tmp_path, monkeypatch):
    file = benchmark(tmp_path, "bad", 2, reward="lightning_rlvr.rewards.MathAnswer", workers=1)
    (tmp_path / "bad.json").write_text(json.dumps([{"question": "q", "answer": "???"}]))
    monkeypatch.setattr(TinyPolicy, "load", None)
    with pytest.raises(UserError, match="bad:0"):
        evaluate(tmp_path / "o", {"t": TinyPolicy()}, [file], **SETTINGS)


def test_a_policy_without_an_eos_of_its_own_takes_the_tokenizers():
    model, tokenizer = TinyPolicy().load()
    model.generation_config.eos_token_id = None
    assert Policy(model, tokenizer).eos_ids == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [3, 4]
    assert Policy(model, tokenizer).eos_ids == [3, 4]


def test_greedy_samples_are_one(tmp_path, benchmarks):
    greedy = {**SETTINGS, "sampling": Sampling(max_new_tokens=3, temperature=0.0)}
    with pytest.raises(UserError, match=r"samples must be 1 where the temperature is 0, got 4"):
        evaluate(tmp_path / "o", {"t": TinyPolicy()}, benchmarks, **greedy)
    report = evaluate(tmp_path / "o", {"t": TinyPolicy()}, benchmarks, **{**greedy, "samples": 1, "ks": None})
    assert report.measures == ["pass@1", "avg@1", "maj@1"]


def test_benchmarks_of_other_numbers_of_samples_share_no_table(tmp_path, benchmarks):
    seven, three = benchmarks
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, [seven], **SETTINGS)
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, [three], **{**SETTINGS, "samples": 2})
    before = files(tmp_path / "o")
    with pytest.raises(UserError, match="as many samples a problem to stand in one table"):
        evaluate(tmp_path / "o", None, [seven, three], **SETTINGS)
    results = "results.json"
    assert files(tmp_path / "o")[results] == before[results]


def test_verdicts_that_are_gone_are_made_with_benchmarks(tmp_path, vowels):
    first = evaluate(tmp_path, {"t": TinyPolicy()}, [vowels], **SETTINGS)
    (tmp_path / "verdicts" / "t" / "vowels.parquet").unlink()
    with pytest.raises(UserError, match=r"verdicts/t/vowels.parquet must be there .* Set benchmarks"):
        evaluate(tmp_path, **SETTINGS)
    assert evaluate(tmp_path, None, [vowels], **SETTINGS) == first


def test_a_benchmark_that_was_never_sampled_is_not_judged(tmp_path, benchmarks):
    seven, three = benchmarks
    evaluate(tmp_path / "o", {"t": TinyPolicy()}, [seven], **SETTINGS)
    with pytest.raises(UserError, match=r"must be sampled on benchmark 'three'.*three.parquet"):
        evaluate(tmp_path / "o", None, [three], **SETTINGS)


def test_verdicts_follow_the_texts_not_only_the_settings(tmp_path, vowels):
    """Another machine samples other texts with the same settings."""
    evaluate(tmp_path, {"t": TinyPolicy()}, [vowels], **SETTINGS)
    file = tmp_path / "samples" / "t" / "vowels.parquet"
    store = Store(tmp_path / "other.parquet", read_manifest(file))
    records = pd.read_parquet(file).to_dict("records")
    store.append([{**record, "response": ["e"] * 4} for record in records])
    store.finish([record["uid"] for record in records])
    store.path.replace(file)
    with pytest.raises(UserError, match="have changed since"):
        evaluate(tmp_path, **SETTINGS)
    evaluate(tmp_path, None, [vowels], **SETTINGS)
    verdicts = pd.read_parquet(tmp_path / "verdicts" / "t" / "vowels.parquet")
    assert {answer for row in verdicts["answer"] for answer in row} == {"e"}


def test_unjudgeable_questions_are_neither_asked_nor_measured(tmp_path):
    file = benchmark(tmp_path, "some", 3)
    rows = [{"question": f"{i}=", "answer": answer} for i, answer in enumerate(["0", "so #### 1", "2"])]
    (tmp_path / "some.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"benchmark 'some': .*some:1"):
        evaluate(tmp_path / "o", {"t": TinyPolicy()}, [file], **SETTINGS)
    report = evaluate(tmp_path / "o", {"t": TinyPolicy()}, [file], **SETTINGS, unjudgeable="drop")
    assert report.problems == {"some": 2}
    samples = pd.read_parquet(tmp_path / "o" / "samples" / "t" / "some.parquet")
    assert samples["uid"].tolist() == ["some:0", "some:2"]


def test_more_tokens_than_positions_are_refused(tmp_path, benchmarks, monkeypatch):
    positions = TinyPolicy().load().model.config.max_position_embeddings
    monkeypatch.setattr(sampling_module, "_respond", None)  # a model is loaded, and asked nothing
    said = rf"model 't': .*at most {positions} tokens.*got up to 2 and {positions - 1}: .*Set sampling.max_new_tokens"
    for tokens, error, match in ((positions - 2, TypeError, ""), (positions - 1, UserError, said)):
        settings = {**SETTINGS, "sampling": Sampling(tokens)}
        with pytest.raises(error, match=match):
            evaluate(tmp_path / str(tokens), {"t": TinyPolicy()}, benchmarks, **settings)
