"""The estimate against tensors that really lived in training."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import lightning
import pytest
import torch
from support import Counting, ManyVowels, TinyPolicy

from lightning_rlvr import preflight
from lightning_rlvr.curriculum import Curriculum
from lightning_rlvr.models import LoRA
from lightning_rlvr.objectives import SENT
from lightning_rlvr.ops.linear_logprob import linear_logprob_loss
from lightning_rlvr.preflight.memory import Vocabulary, Work, estimate
from lightning_rlvr.preflight.placement import Placement, placement
from lightning_rlvr.preflight.trace import LiveBytes
from lightning_rlvr.rollout import linear, llama_gpu, llama_step
from lightning_rlvr.rollout.llama_gpu import LlamaGpuStep, merged_bytes
from lightning_rlvr.rollout.shared_prefix import SharedPrefixDecoder
from lightning_rlvr.training import RLVRDataModule, RLVRModule
from lightning_rlvr.types import Sampling, UserError

NO_EVALUATION = {
    "eval_prompts": 0,
    "eval_samples": 0,
    "eval_tokens": 0,
    "with_entropy": False,
    "recompute": False,
    "temperature": 1.0,
}


class SmallPolicy(TinyPolicy):
    """Large enough for its tensors to outweigh what Python and Lightning hold beside."""

    sizes: ClassVar = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
    }

    def skeleton(self):
        return self.load().model.to("meta")


class Checkpointed(SmallPolicy):
    """The same with its layers recomputed in the backward pass."""

    def load(self):
        policy = super().load()
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.train()
        return policy


@pytest.mark.parametrize(
    ("policy", "micro"),
    [
        pytest.param(SmallPolicy(), 4, id="smallest parts"),  # beside which the rollout is the peak
        pytest.param(SmallPolicy(), 12, id="small parts"),
        pytest.param(SmallPolicy(), 64, id="large parts"),
        pytest.param(Checkpointed(), 64, id="recomputed layers"),
        pytest.param(LoRA(SmallPolicy(), rank=4), 64, id="adapters"),
    ],
)
def test_the_peak_is_near_what_lived(tmp_path, policy, micro, monkeypatch):
    monkeypatch.setattr(linear, "MOST_PACKED", 0)  # LiveBytes does not see into packed weights
    module = RLVRModule(
        policy,
        SENT(),
        ManyVowels(),
        Sampling(16),  # short, so that few responses of a policy that knows nothing end before
        optimizer=partial(torch.optim.AdamW, lr=1e-6),
        micro_batch_size=micro,
        pass_at=[1],
    )
    order = Curriculum(order="shuffled", stages=1)
    data = RLVRDataModule(Counting(16, 100), prompts_per_batch=8, group_size=12, curriculum=order)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with LiveBytes() as live:
        trainer.fit(module, data)
    said = preflight.inspect(data, module, {"trainer": {"accelerator": "cpu", "devices": 1}})
    recomputed = type(policy) is Checkpointed
    assert said.memory.peak == pytest.approx(live.peak, rel=0.2 if recomputed else 0.15)
    if type(policy) is SmallPolicy and micro > 4:
        assert max(said.memory.totals, key=said.memory.totals.get) == "update"


def test_the_head_takes_what_its_formula_says():
    size, hidden, tokens = 20_000, 32, 300
    weight, states = torch.randn(size, hidden, requires_grad=True), torch.randn(tokens, hidden, requires_grad=True)
    with LiveBytes() as live:
        linear_logprob_loss(
            states, weight, torch.zeros(tokens, dtype=torch.long), torch.tensor([150, 150]), lambda logp, *_: logp.sum()
        )
    peak, kept = Vocabulary(size, hidden, 4, Placement()).head(tokens, True, True, 1.0)
    assert peak == pytest.approx(live.peak, rel=0.15)
    assert kept == 4 * (size + tokens) * hidden


def test_rollouts_under_autocast_hold_rounded_weights_and_keys():
    source = SmallPolicy()
    model, sampling = source.skeleton(), {"samples": 4, "prompt_tokens": 8, "response_tokens": 16}
    work = Work(**sampling, **NO_EVALUATION, prompts=2, updates=1, micro_batch_size=8, rollout_rows=8)
    wide, half = (
        estimate(model, work, Placement(accelerator=True, autocast=dtype), torch.optim.AdamW, False).moments["rollout"]
        for dtype in (None, torch.bfloat16)
    )
    count = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
    assert (wide["prepared weights"], half["prepared weights"]) == (merged_bytes(model), 2 * count)
    assert half["keys and values"] * 2 == wide["keys and values"]
    sharded = Placement(accelerator=True, autocast=torch.bfloat16, world=2, weights=2)
    gathered = estimate(model, work, sharded, torch.optim.AdamW, False).moments["rollout"]
    assert gathered["prepared weights"] == 0
    assert gathered["gathered weights"] == 2 * sum(weight.numel() for weight in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        decoder = SharedPrefixDecoder(source.load().model, 8, 16)
        decoder.read(torch.full((2, 8), 5), torch.ones(2, 8, dtype=torch.bool), 4)
        decoder.step(torch.full((8,), 5))
    held = [x for of in decoder.layers for x in (of.prompt_keys, of.prompt_values, of.own_keys, of.own_values)]
    assert sum(x.nbytes for x in held) == half["keys and values"]
    assert sum(weight.nbytes for weight in decoder.linears.weights.values()) == half["prepared weights"]


def test_rollouts_on_a_cpu_hold_packed_weights(monkeypatch):
    source = SmallPolicy()
    model = source.skeleton()

    def said(**place):
        return estimate(model, small_work(), Placement(**place), torch.optim.AdamW, False).moments["rollout"]

    packed, pack = 0, linear.packed

    def counted(weight):
        nonlocal packed
        packed += weight.nbytes
        return pack(weight)

    monkeypatch.setattr(llama_step, "packed", counted)
    with torch.no_grad():
        SharedPrefixDecoder(source.load().model, 8, 16).read(
            torch.full((2, 8), 5), torch.ones(2, 8, dtype=torch.bool), 4
        )
    assert packed == said()["prepared weights"] > 0
    monkeypatch.setattr(linear, "MOST_PACKED", 0)
    assert said()["prepared weights"] == 0, "too many to be held twice"


def test_rollouts_on_a_gpu_hold_products_side_by_side(monkeypatch):
    model = SmallPolicy().load().model
    step = LlamaGpuStep(model, 24)
    held = sum(
        weight.nbytes for layer in step.layers for part in (layer.inputs, layer.inner) for weight in part.weights
    )

    def said(**place):
        place = Placement(accelerator=True, **place)
        return estimate(model, small_work(), place, torch.optim.AdamW, False).moments["rollout"]["prepared weights"]

    assert said() == held > 0
    assert said(world=2, weights=2) == 0
    monkeypatch.setattr(llama_gpu, "MOST_MERGED", 0)
    assert said() == 0


def small_work():
    return Work(
        samples=4, prompt_tokens=8, response_tokens=16, prompts=2, updates=1, micro_batch_size=8, rollout_rows=8,
        **NO_EVALUATION,
    )  # fmt: skip


def test_a_reference_that_is_kept_off_a_gpu_is_there_for_its_pass():
    model = SmallPolicy().skeleton()
    weights = sum(p.nbytes for p in model.parameters())

    def told(accelerator, offloaded):
        return estimate(model, small_work(), Placement(accelerator=accelerator), torch.optim.AdamW, True, offloaded)

    there, away, cpu = told(True, False), told(True, True), told(False, True)
    assert (there.parts["reference"], away.parts["reference"], cpu.parts["reference"]) == (weights, 0, weights)
    assert away.moments["reference"]["reference"] == weights
    assert "reference" not in there.moments | cpu.moments
    assert {name: there.totals[name] - away.totals[name] for name in there.totals} == dict.fromkeys(
        there.totals, weights
    )


def test_gradients_are_there_in_updates_only_but_for_those_in_buffers():
    model = SmallPolicy().skeleton()
    weights = sum(p.nbytes for p in model.parameters())
    freed, stay = (
        estimate(model, small_work(), Placement(gradients_stay=stay), torch.optim.AdamW, True) for stay in (False, True)
    )
    less = {name: stay.totals[name] - freed.totals[name] for name in stay.totals}
    assert less == {"rollout": weights, "plan": weights, "update": 0, "optimizer step": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deepspeeds_optimizer_steps_float32_weights(dtype):
    model = SmallPolicy().skeleton().to(dtype)
    place = Placement(dtype=dtype, master_bytes=4 if dtype == torch.bfloat16 else 0)
    count = sum(p.numel() for p in model.parameters())
    parts = estimate(model, small_work(), place, torch.optim.AdamW, False).parts
    assert parts["optimizer"] == (4 + 4 + place.master_bytes) * count


def test_a_strategy_shares_out_what_it_shards():
    four = {"accelerator": "gpu", "devices": 4, "precision": "bf16-mixed"}
    ddp, fsdp = (placement({**four, "strategy": name}, False) for name in ("ddp", "fsdp2"))
    assert (ddp.world, ddp.weights, ddp.optimizer, ddp.buckets) == (4, 1, 1, True)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.joined) == (4, 4, 4, True)
    view = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}
    assert placement({**four, "strategy": view}, False) == replace(ddp, buckets=False, gradients_stay=True)
    two, three = (placement({**four, "strategy": f"deepspeed_stage_{stage}"}, False) for stage in (2, 3))
    assert (two.weights, two.gradients, two.optimizer, two.master_bytes) == (1, 4, 4, 4)
    assert (three.weights, three.dtype, three.autocast) == (4, torch.bfloat16, None)
    assert placement({"accelerator": "auto", "devices": "0,1", "num_nodes": 2}, False).world == 4


@pytest.mark.parametrize(("key", "value"), [("strategy", "telepathy"), ("strategy", "fsdp"), ("precision", "4-bit")])
def test_what_cannot_be_counted_is_refused(key, value):
    with pytest.raises(UserError, match=f"got {value}. Set trainer.{key}"):
        placement({"devices": 1, key: value}, False)
