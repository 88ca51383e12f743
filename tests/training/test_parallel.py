"""Strategies on two processes against one process. As a script, this file is one of the two."""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_rlvr.models.forward import packs
from lightning_rlvr.types import UserError

DYNAMIC = {"dynamic_sampling": 3, "updates": 2}


def train(
    folder,
    strategy="auto",
    processes=1,
    policy=None,
    objective=None,
    reward=None,
    resume=None,
    updates=3,
    recompute_logp="auto",
    dynamic_sampling=0,
    **settings,
):
    """Train on 24 rows a batch, however many processes share them; return trainer and whole weights."""
    import lightning
    from support import Counting, ManyVowels, TinyPolicy

    from lightning_rlvr.curriculum import Curriculum
    from lightning_rlvr.objectives import SENT
    from lightning_rlvr.training import RLVRDataModule, RLVRModule
    from lightning_rlvr.training.callbacks import ExportPolicy, RunCheckpoints, RunFolder
    from lightning_rlvr.training.checkpoint import newest_checkpoint
    from lightning_rlvr.types import Sampling

    module = RLVRModule(
        policy or TinyPolicy(),
        objective or SENT(low_entropy_quantile=0.8, high_cov_fraction=0.1, beta_low=0.5, beta_high=2.0),
        reward or ManyVowels(),
        Sampling(10),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, eps=1e-4),
        micro_batch_size=5,
        max_grad_norm=0.5,
        recompute_logp=recompute_logp,
        dynamic_sampling=dynamic_sampling,
        pass_at=[1],
    )
    data = RLVRDataModule(
        train=Counting(24),
        val=Counting(3, 24),  # looked at before training, in inference mode; one process has more than the other
        eval_samples=1,
        eval_prompts_per_batch=1,
        prompts_per_batch=6,
        group_size=4,
        curriculum=Curriculum(order="shuffled", stages=1),
    )
    trainer = lightning.Trainer(
        max_steps=updates,
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[RunFolder(), ExportPolicy(), RunCheckpoints(save_last=True, save_top_k=0, every_n_train_steps=1)],
        **settings,
    )
    found = None if resume is None else newest_checkpoint(resume / "checkpoints")
    trainer.fit(module, data, ckpt_path=None if found is None else found.path)
    return trainer, {name: weight.clone() for name, weight in module.parallel.full_state(module.policy).items()}


def adapted(recompute):
    """A policy with adapters, and questions of which every second teaches nothing, differently many a process."""
    from dataclasses import replace

    from support import ManyVowels, TinyPolicy

    from lightning_rlvr.models import LoRA
    from lightning_rlvr.objectives import GRPO

    class Recomputed(TinyPolicy):
        def load(self):
            policy = super().load()
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
            policy.model.train()
            return policy

    class EvenAreAlike(ManyVowels):
        def __call__(self, responses, prompts):
            pairs = zip(super().__call__(responses, prompts), prompts, strict=True)
            return [replace(verdict, score=0.5) if int(p.answer) % 2 == 0 else verdict for verdict, p in pairs]

    policy = LoRA(Recomputed() if recompute else TinyPolicy(), rank=4)
    return {"policy": policy, "objective": GRPO(), "reward": EvenAreAlike()}


def on_cpu(stage):
    """DeepSpeed's strategy, which Lightning keeps from CPUs, without the operator that would be compiled there."""
    import deepspeed.comm.torch  # noqa: F401 - `torch` is another module by this name

    class OnCPU(DeepSpeedStrategy):
        root_device = property(lambda self: torch.device("cpu", 0))

        def setup_environment(self):
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self):
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    return OnCPU(stage=stage)


def in_parts():
    """FSDP2 whose checkpoints are folders."""
    from lightning_rlvr.training.parallel import FSDP2Strategy

    return FSDP2Strategy(save_distributed_checkpoint=True)


@contextmanager
def nan_on_the_second_rank(rank):
    """Have the first loss of rank 1 be nan."""
    from lightning_rlvr.training import update

    compute, calls = update.response_loss, []

    def faulty(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs) * (float("nan") if rank == 1 and len(calls) == 1 else 1.0)

    update.response_loss = faulty
    yield
    update.response_loss = compute


def worker(rank, folder):
    two, anew = {"processes": 2, "strategy": "fsdp2"}, {"recompute_logp": True}  # a pass of its own before training's
    runs = {
        "ddp": {"processes": 2, "strategy": "ddp"},
        "fsdp2": two,
        "dynamic": two | DYNAMIC,
        "half": two | anew | {"updates": 2},
        "rest": two | anew | {"resume": folder / "half"},
        "parts_half": two | {"strategy": in_parts(), "updates": 2},
        "parts": two | {"strategy": in_parts(), "resume": folder / "parts_half"},
        "adapters": two | adapted(recompute=True),
        "bf16": two | {"precision": "bf16-mixed", "updates": 1},
        "zero2": {"processes": 2, "strategy": on_cpu(2)},
        "zero3_half": {"processes": 2, "strategy": on_cpu(3), "updates": 2} | anew,
        "zero3": {"processes": 2, "strategy": on_cpu(3), "resume": folder / "zero3_half"} | anew,
    }
    for name, settings in runs.items():
        trainer, weights = train(folder / name, **settings)
        if rank == 0:
            torch.save((weights, trainer.logged_metrics), folder / f"{name}.pt")
    with nan_on_the_second_rank(rank):
        train(folder / "nan", **two)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind."""
    from support import two_processes  # not where this file runs as a script

    folder = tmp_path_factory.mktemp("two_processes")
    two_processes(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Whole weights and last metrics of one process."""
    folder = tmp_path_factory.mktemp("one_process")
    settings = {"plain": {}, "dynamic": DYNAMIC, "adapters": adapted(recompute=False)}
    runs = {name: train(folder / name, **more) for name, more in settings.items()}
    return {name: (weights, trainer.logged_metrics) for name, (trainer, weights) in runs.items()}


@pytest.mark.parametrize(
    ("name", "one"),
    [(name, "plain") for name in ("ddp", "fsdp2", "rest", "parts", "zero2", "zero3")]
    + [(name, name) for name in ("dynamic", "adapters")],
)
def test_two_processes_train_what_one_trains(folder, alone, name, one):
    weights, metrics = torch.load(folder / f"{name}.pt")
    assert weights.keys() == alone[one][0].keys()
    for key, weight in alone[one][0].items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-6, msg=f"{name} {key}")
    for key in ("loss", "grad_norm", "entropy", "reward", "grad_share/policy"):
        assert float(metrics[f"train/{key}"]) == pytest.approx(
            float(alone[one][1][f"train/{key}"]), rel=1e-3, abs=1e-7
        ), key
    assert float(metrics["train/grad_norm"]) > 0.5 or one == "adapters", "else nothing was clipped"


def test_the_policy_did_move(alone):
    from support import TinyPolicy

    start = TinyPolicy().load().model.state_dict()
    assert max(float((alone["plain"][0][name] - weight).abs().max()) for name, weight in start.items()) > 1e-3
    assert max(float(w.abs().max()) for name, w in alone["adapters"][0].items() if "lora_B" in name) > 1e-4


def test_a_batch_with_a_nan_on_one_process_is_left_out_and_kept_whole(folder):
    from lightning_rlvr.training.replay import load_replay

    (kept,) = (folder / "nan" / "failed").iterdir()
    replay = load_replay(kept)
    assert kept.name == "000001"
    assert len(replay.score) == 24
    assert len(set(replay.row_id.tolist())) == 24


def test_processes_skip_the_same_number_of_rows_or_none(folder, alone):
    """Sharded weights are gathered by all at once: one process runs idle rows where the other has more to do."""
    skipped = float(alone["adapters"][1]["train/skipped_rows"])
    assert 0 <= float(torch.load(folder / "adapters.pt")[1]["train/skipped_rows"]) <= skipped < 1
    assert skipped > 0


def test_a_checkpoint_holds_what_is_trained(folder, alone):
    for name in ("fsdp2", "adapters"):
        stored = torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        trained = [key for key in torch.load(folder / f"{name}.pt")[0] if name == "fsdp2" or "lora_" in key]
        assert sorted(stored) == sorted(f"policy.{key}" for key in trained)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "adapters", "bf16", "zero2", "zero3"])
def test_the_export_is_one_whole_folder(folder, name):
    from support import TinyPolicy
    from transformers import AutoModelForCausalLM

    from lightning_rlvr.models import LoRA
    from lightning_rlvr.models.lora import merged

    source = LoRA(TinyPolicy(), rank=4) if name == "adapters" else TinyPolicy()
    expected = merged(source.load().model, torch.load(folder / f"{name}.pt")[0])
    exported = AutoModelForCausalLM.from_pretrained(folder / name / "policy").state_dict()
    assert exported.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(exported[key], weight), key
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()


class Engine:
    """What `ZeRO` asks of DeepSpeed's engine, and a log of it."""

    def __init__(self):
        self.log = []
        self.optimizer = SimpleNamespace(clear_backward_seen_flag=lambda: self.log.append("next"))

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.log.append(is_boundary)

    def get_global_grad_norm(self):
        return 0.75 if "step" in self.log else None


def test_deepspeed_knows_which_backward_pass_precedes_a_step():
    from lightning_rlvr.training.parallel import ZeRO

    engine = Engine()
    trainer, backward = SimpleNamespace(model=engine), lambda loss: engine.log.append(loss)
    zero = ZeRO(SimpleNamespace(trainer=trainer, manual_backward=backward, device="cpu"))
    zero.backward("first", last=False)
    zero.backward("second", last=True)
    assert float(zero.step(SimpleNamespace(step=lambda: engine.log.append("step")), 0.5, zero.norm())) == 0.75
    assert engine.log == [False, "first", "next", True, "second", "next", "step"]


def test_deepspeed_gathers_what_it_holds_in_parts(monkeypatch):
    from support import TinyPolicy

    from lightning_rlvr.training.parallel import ZeRO

    model, gathered = TinyPolicy().load().model, []

    @contextmanager
    def gather(what):
        gathered.append(what)
        yield
        gathered.append("given back")

    engine, zero = Engine(), ModuleType("deepspeed.runtime.zero")
    zero.GatheredParameters, zero.unwrap_model_for_generation = gather, gather
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
        monkeypatch.setitem(sys.modules, name, zero)
    parallel = ZeRO(SimpleNamespace(trainer=SimpleNamespace(model=engine)))
    with parallel.whole(model):
        assert parallel.full_state(model).keys() == model.state_dict().keys()
    assert gathered == []
    next(model.parameters()).ds_id = 0
    with parallel.whole(model):
        assert gathered == [engine]
    assert torch.equal(parallel.full_state(model)["lm_head.weight"], model.lm_head.weight)
    assert len(gathered[2]) == len(list(model.parameters()))
    with pytest.warns(UserWarning, match="plain way.*ZeRO stage 3"):
        assert not packs(model)


def test_deepspeed_is_given_the_bound_and_leaves_the_reference_out():
    from lightning_rlvr.training.parallel import ZeRO, parallel_of

    for given, bound, expected in (({}, 0.5, 0.5), ({}, None, 0.0), ({"gradient_clipping": 2.0}, 0.5, 0.5)):
        strategy = object.__new__(DeepSpeedStrategy)  # as its making imports DeepSpeed
        strategy.config = given
        trainer = SimpleNamespace(strategy=strategy)
        module = SimpleNamespace(_trainer=trainer, max_grad_norm=bound, micro_batch_size=5)
        assert isinstance(parallel_of(module), ZeRO)
        assert strategy.config == {"gradient_clipping": expected, "train_micro_batch_size_per_gpu": 5}
        assert strategy.exclude_frozen_parameters


def test_tensor_parallelism_is_refused():
    from lightning_rlvr.training.parallel import parallel_of

    strategy = object.__new__(ModelParallelStrategy)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(UserError, match=r"tensor_parallel_size must be 1, got 2.*Set trainer\.strategy"):
        parallel_of(SimpleNamespace(_trainer=SimpleNamespace(strategy=strategy)))


def test_fully_sharded_data_parallelism_of_old_is_refused():
    from lightning_rlvr.training.parallel import parallel_of

    with pytest.raises(UserError, match=r"must not be fsdp.*Set trainer\.strategy to fsdp2"):
        parallel_of(SimpleNamespace(_trainer=SimpleNamespace(strategy=object.__new__(FSDPStrategy))))


def test_a_strategy_that_could_not_read_its_checkpoints_is_refused():
    from lightning_rlvr.training.parallel import parallel_of

    strategy = ModelParallelStrategy(2, 1)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}
    with pytest.raises(UserError, match=r"save_distributed_checkpoint must be false.*FSDP2Strategy"):
        parallel_of(SimpleNamespace(_trainer=SimpleNamespace(strategy=strategy)))


def test_deepspeed_cannot_leave_an_update_out():
    from lightning_rlvr.training.parallel import ZeRO

    with pytest.raises(UserError, match="cannot be left out under DeepSpeed"):
        ZeRO(SimpleNamespace()).drop(SimpleNamespace())


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
