import errno
import json
import random
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlvr.models.cache import build_once
from lightning_rlvr.models.embedded import Embedded
from lightning_rlvr.models.warm_start import IGNORED, collate
from lightning_rlvr.types import Teacher, UserError


class Echo(Teacher):
    """Answers a digit with itself, twice."""

    def examples(self, seed):
        rng = random.Random(seed)
        while True:
            digit = str(rng.randrange(10))
            yield f"say {digit}:", digit * 2


class Short(Teacher):
    def examples(self, seed):
        yield from [("1", "1")] * 5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return Embedded(Echo(), hidden_size=32, layers=1, heads=2, steps=40, batch_size=16, lr=1e-2, cache_dir=cache)


@pytest.fixture(scope="module")
def policy(source):
    return source.load()


def weights(policy):
    return policy.model.state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_warm_start_lowers_the_loss_of_solution_and_eos(source, policy):
    loss = json.loads((source.folder / "warm_start.json").read_text())["loss"]
    batch = collate(list(islice(Echo().examples(99), 32)), 32, policy.tokenizer)
    with torch.no_grad():
        logits = policy.model(input_ids=batch.input_ids[:, :-1]).logits
    unseen = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )

    assert len(loss) == 40
    assert loss[0] == pytest.approx(torch.tensor(len(policy.tokenizer)).log().item(), abs=0.5)
    assert unseen < 0.5 * loss[0]


def test_only_solution_and_eos_are_learned(policy):
    batch = collate([("ab", "c"), ("a", "")], 2, policy.tokenizer)
    c, eos = policy.tokenizer("c")["input_ids"][0], policy.tokenizer.eos_token_id

    assert batch.labels.tolist() == [[IGNORED, IGNORED, c, eos], [IGNORED, eos, IGNORED, IGNORED]]


def test_a_second_load_comes_from_the_cache_and_is_a_copy(source, policy):
    stamp = (source.folder / "model.safetensors").stat().st_mtime_ns
    start = time.perf_counter()
    again = source.load()
    seconds = time.perf_counter() - start

    assert same(weights(policy), weights(again))
    assert (source.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert seconds < 5
    with torch.no_grad():
        next(again.model.parameters()).zero_()
    assert not same(weights(policy), weights(again))


def test_the_seed_decides_the_weights(source, policy, tmp_path):
    elsewhere = replace(source, cache_dir=str(tmp_path))

    assert elsewhere.fingerprint() == source.fingerprint()
    assert same(weights(elsewhere.load()), weights(policy))
    other = replace(elsewhere, seed=2, steps=1)
    assert not same(weights(other.load()), weights(replace(other, seed=3).load()))


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"lr": 2e-2}, {"steps": 41}, {"layers": 2}, {"heads": 1}, {"teacher": Short()}]
)
def test_the_fingerprint_follows_what_decides_the_weights(source, change):
    assert replace(source, **change).fingerprint() != source.fingerprint()


def test_the_global_random_state_is_untouched(source, tmp_path):
    fresh = replace(source, steps=2, cache_dir=str(tmp_path))
    before, python_before = torch.get_rng_state(), random.getstate()
    fresh.load()

    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before


def test_the_policy_is_ready_for_sampling_and_training(policy):
    assert not policy.model.training
    assert policy.model.get_input_embeddings().padding_idx is None
    ids = policy.tokenizer("say 3:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        found = policy.model.train()(input_ids=ids).logits
    policy.model.eval()
    assert torch.equal(found, expected)


def test_the_cache_is_a_hugging_face_folder(source, policy):
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    out = model.generate(**tokenizer("say 3:", return_tensors="pt"), max_new_tokens=4, do_sample=False)

    assert same(model.state_dict(), weights(policy))
    assert out.shape[1] > 6
    assert set(tokenizer.decode(out[0, 6:], skip_special_tokens=True)) <= set("0123456789")


def test_a_failed_warm_start_leaves_nothing_behind(tmp_path):
    source = Embedded(Short(), hidden_size=32, layers=1, heads=2, steps=2, batch_size=4, cache_dir=str(tmp_path))

    with pytest.raises(UserError, match=r"3 short of a batch of 4.*model\.policy\.init_args\.teacher"):
        source.load()
    assert list(tmp_path.iterdir()) == []


def fill_the_disk(folder):
    (folder / "half").write_text("x")
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_in_safetensors(folder):
    save_file({"half": torch.zeros(1)}, folder / "missing" / "model.safetensors")  # raises no OSError


@pytest.mark.parametrize(("build", "reason"), [(fill_the_disk, "No space left"), (fail_in_safetensors, "os error 2")])
def test_a_build_that_cannot_be_written_is_explained_and_leaves_nothing(build, reason, tmp_path):
    with pytest.raises(UserError, match=rf"{reason}.*model\.policy\.init_args\.cache_dir"):
        build_once(tmp_path / "policy", build)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_is_named(source, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match=r"model\.policy\.init_args\.cache_dir"):
        replace(source, cache_dir=str(tmp_path / "file")).prepare()


def test_the_cache_folder_follows_the_environment(source, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(tmp_path))

    assert replace(source, cache_dir=None).folder.parent == tmp_path


@pytest.mark.parametrize(("change", "named"), [({"steps": 0}, "steps"), ({"heads": 5}, "hidden_size")])
def test_wrong_settings_are_refused_by_name(source, change, named):
    with pytest.raises(UserError, match=rf"model\.policy\.init_args\.{named}"):
        replace(source, **change)
