"""Policies with adapters."""

import pytest
import torch
from support import TinyPolicy

from lightning_rlvr.models import Checkpoint, LoRA
from lightning_rlvr.models.lora import frozen, merged, save_model
from lightning_rlvr.types import UserError

IDS = torch.tensor([[5, 9, 14, 3, 7]])


@pytest.fixture
def policy():
    """Its adapters moved from where they start."""
    model = LoRA(TinyPolicy(), rank=4, alpha=6).load().model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_it_starts_as_the_policy_beneath():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    source = LoRA(TinyPolicy(), rank=4)
    model = source.load().model
    assert torch.equal(logits(model), logits(TinyPolicy().load().model))
    assert source.fingerprint() == TinyPolicy().fingerprint()
    assert torch.equal(torch.random.get_rng_state(), before)
    again = dict(source.load().model.named_parameters())
    assert all(torch.equal(weight, again[name]) for name, weight in model.named_parameters())


def test_only_adapters_are_trained(policy):
    policy(input_ids=IDS).logits.sum().backward()
    for name, weight in policy.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad == ("lora_" in name), name
    adapted = {name.split(".")[-4] for name, weight in policy.named_parameters() if weight.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_reference_is_the_policy_beneath_and_shares_its_memory(policy):
    reference = frozen(policy)
    assert torch.equal(logits(reference), logits(TinyPolicy().load().model))
    assert (logits(policy) - logits(reference)).abs().max() > 1e-2
    own = {weight.data_ptr() for weight in policy.parameters()}
    assert {weight.data_ptr() for weight in reference.parameters()} < own
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert any(weight.requires_grad for weight in policy.parameters())


def test_a_reference_without_adapters_is_a_copy(tiny_policy):
    model = tiny_policy.load().model
    assert {w.data_ptr() for w in model.parameters()}.isdisjoint(w.data_ptr() for w in frozen(model).parameters())


def test_merged_weights_are_the_policy(policy, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = TinyPolicy().load().model
    plain.load_state_dict(merged(policy, policy.state_dict()))
    torch.testing.assert_close(logits(plain), logits(policy), rtol=0, atol=1e-5)
    save_model(policy, policy.state_dict(), tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(exported) is type(plain)
    torch.testing.assert_close(logits(exported), logits(policy), rtol=0, atol=1e-5)


def test_a_checkpoint_of_the_adapters_is_enough(policy, tmp_path):
    state = {f"policy.{name}": weight for name, weight in policy.named_parameters() if weight.requires_grad}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    loaded = Checkpoint(str(tmp_path / "last.ckpt"), LoRA(TinyPolicy(), rank=4, alpha=6)).load().model
    assert torch.equal(logits(loaded), logits(policy))
    with pytest.raises(UserError, match="checkpoint of the policy named"):
        Checkpoint(str(tmp_path / "last.ckpt"), TinyPolicy()).load()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"rank must be positive.*Set model\.policy\.init_args\.rank"):
        LoRA(TinyPolicy(), rank=0)
    with pytest.raises(UserError, match=r"targets must name linear layers.*Set model\.policy\.init_args\.targets"):
        LoRA(TinyPolicy(), targets=["no_such_layer"]).load()
