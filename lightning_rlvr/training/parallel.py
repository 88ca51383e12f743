"""What the strategies of Lightning do differently, as far as the training step and what it leaves behind see it.

`Parallel` fits one process and DDP, where each process holds all weights. `FullySharded` is FSDP2 (fully_shard of torch
under ModelParallelStrategy), `ZeRO` is DeepSpeed. Both hold a part of the weights (ZeRO from stage 3 on), gradients and
optimizer state in each process; weights are gathered layer by layer in training, and all at once for sampling, where
processes take different numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_rlvr.models.forward import WITHIN, sharded
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from lightning_rlvr.training.module import RLVRModule

T = TypeVar("T")


class Parallel:
    """Every process holds the whole model.

    Args:
        module: whose policy is trained.
    """

    begins_again = True  # whether a step can be: no process waits for another before its last backward pass

    def __init__(self, module: RLVRModule) -> None:
        self.module = module

    def whole(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Let all weights be at hand in every process, which then may differ in how often it runs the model."""
        return nullcontext()

    def release(self, model: nn.Module) -> None:
        """Let go of weights that passes without gradients have left gathered."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch; processes exchange what has come together at the `last` of a step."""
        wrapped = None if last else self._ddp()
        with nullcontext() if wrapped is None else wrapped.no_sync():
            self.module.manual_backward(loss)

    def _ddp(self) -> DistributedDataParallel | None:
        wrapped = getattr(self.module.trainer, "model", None)
        return wrapped if isinstance(wrapped, DistributedDataParallel) else None

    def norm(self) -> Tensor:
        """Return the norm of the gradient, over all processes."""
        return nn.utils.get_total_norm([p.grad for p in self.module.policy.parameters() if p.grad is not None])

    def step(self, optimizer: LightningOptimizer, bound: float | None, norm: Tensor) -> Tensor:
        """Scale the gradient, of that norm, down to the norm `bound` and take a step; return the norm before."""
        if bound is not None:
            nn.utils.clip_grads_with_norm_(self.module.policy.parameters(), bound, norm)
        optimizer.step()
        return norm

    def drop(self, optimizer: LightningOptimizer) -> None:
        """Let the gradient go without a step."""
        optimizer.zero_grad()

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole weights, all processes together; those other than the first may get nothing."""
        return model.state_dict()


class FullySharded(Parallel):
    """FSDP2: each process holds a part of each weight.

    Gradients are reduced at each micro-batch, so that no process ever holds the whole of them.
    """

    begins_again = False

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Gather all weights once; no forward pass communicates while they are there."""
        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]  # the root is the first
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
            for part in parts[1:]:
                part.set_reshard_after_forward(True, recurse=False)

    def release(self, model: nn.Module) -> None:
        """Reshard the root, which fully_shard leaves gathered for a backward pass to come.

        Beside the memory: as long as it is gathered, the model's parameters are not those that the optimizer has, and
        their gradients are not those that it sees.
        """
        cast(FSDPModule, model).reshard()

    def norm(self) -> Tensor:
        """The norm of sharded gradients is that of all shards."""
        return cast(DTensor, super().norm()).full_tensor()

    def step(self, optimizer: LightningOptimizer, bound: float | None, norm: Tensor) -> Tensor:
        """Every process scales its shards alike."""
        scale = 1.0 if bound is None else min(1.0, bound / (float(norm) + 1e-6))
        for parameter in self.module.policy.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        optimizer.step()
        return norm

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Gather the weights one by one into the first process's memory."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return state


class ZeRO(Parallel):
    """DeepSpeed, which clips gradients itself."""

    begins_again = False

    @property
    def engine(self) -> Any:
        """The engine around the module."""
        return self.module.trainer.model

    def whole(self, model: nn.Module) -> AbstractContextManager[Any]:
        """With stage 3, gather all weights once and take away the hooks that gather them layer by layer."""
        if not sharded(model):
            return nullcontext()
        from deepspeed.runtime.zero import unwrap_model_for_generation

        return unwrap_model_for_generation(self.engine)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Say whether a step follows, and that what comes is another micro-batch.

        DeepSpeed takes its engine's forward for the beginning of one, which here is the whole training step.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.module.manual_backward(loss)
        self.engine.optimizer.clear_backward_seen_flag()

    def norm(self) -> Tensor:
        """The norm is known after the step: see `step`."""
        return torch.zeros((), device=self.module.device)

    def step(self, optimizer: LightningOptimizer, bound: float | None, norm: Tensor) -> Tensor:
        """The bound is in DeepSpeed's configuration."""
        optimizer.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.module.device)

    def drop(self, optimizer: LightningOptimizer) -> None:
        """Raise UserError: the gradient that DeepSpeed has taken in cannot be taken back."""
        raise UserError(
            "an update whose numbers are not finite cannot be left out under DeepSpeed, which has the gradient then. "
            "Continue from the last checkpoint with a lower lr, or set trainer.strategy to fsdp2."
        )

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Gather the weights if they are in parts."""
        if not sharded(model):
            return model.state_dict()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(model.parameters())):
            return {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}


class FSDP2Strategy(ModelParallelStrategy):
    """`--trainer.strategy fsdp2`: weights are shared out over all processes.

    A checkpoint is one file, or with `save_distributed_checkpoint` (the class's default) a folder into which each
    process writes its part.
    """

    def setup_environment(self) -> None:
        """Let no two processes hold the same part."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; of one in parts what it holds: what is trained, where Lightning asks for all weights."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return super().load_checkpoint(path, weights_only)
        from torch.distributed import checkpoint as parts
        from torch.distributed.checkpoint import state_dict as states

        module = self.lightning_module
        assert module is not None
        held = parts.FileSystemReader(path).read_metadata().state_dict_metadata
        named = states.get_model_state_dict(module)
        weights: dict[str, Any] = {k: weight for k, weight in named.items() if f"state_dict.{k}" in held}
        parts.load({"state_dict": weights}, checkpoint_id=path)
        module.load_state_dict(weights, strict=False)
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": states.get_optimizer_state_dict(module, optimizer)}
            parts.load(state, checkpoint_id=path)
            (moments,) = state.values()
            states.set_optimizer_state_dict(module, optimizer, optim_state_dict=moments)
        return dict(torch.load(path / "meta.pt", map_location="cpu", weights_only=True))


StrategyRegistry.register("fsdp2", FSDP2Strategy, save_distributed_checkpoint=False)


def parallel_of(module: RLVRModule) -> Parallel:
    """Return what fits the strategy, and let it have its way with the models that the module has loaded."""
    trainer = getattr(module, "_trainer", None)
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                f"tensor_parallel_size must be 1, got {mesh['tensor_parallel'].size()}: weights are shared out over "
                "processes that each have their own questions. Set trainer.strategy to fsdp2, or data_parallel_size "
                "to the number of processes."
            )
        if strategy._save_distributed_checkpoint and not isinstance(strategy, FSDP2Strategy):
            raise UserError(
                "save_distributed_checkpoint must be false for ModelParallelStrategy, got true: it cannot read back "
                "checkpoints that leave out the frozen reference. Set it, or trainer.strategy to "
                "lightning_rlvr.training.parallel.FSDP2Strategy."
            )
        for model in (module.policy, module.reference):
            if model is not None:
                shard(model, mesh["data_parallel"], half=strategy.precision_plugin.precision == "bf16-mixed")
        return FullySharded(module)
    if isinstance(strategy, FSDPStrategy):
        raise UserError(
            "strategy must not be fsdp: it exchanges gradients around one forward pass, and takes the whole training "
            "step, with its backward passes, for that. Set trainer.strategy to fsdp2."
        )
    if isinstance(strategy, DeepSpeedStrategy):
        assert isinstance(strategy.config, dict)
        strategy.config["gradient_clipping"] = module.max_grad_norm or 0.0
        strategy.config["train_micro_batch_size_per_gpu"] = module.micro_batch_size  # for its measure of throughput
        strategy.exclude_frozen_parameters = True  # of checkpoints: the reference, what lies beneath adapters
        return ZeRO(module)
    return Parallel(module)


def shard(model: PreTrainedModel, mesh: DeviceMesh, half: bool = False) -> None:
    """Share out the weights of a model over the processes of a mesh, by torch's fully_shard.

    Layers are gathered one at a time. The rest (embedding, norm, head) is gathered together where the model's forward
    runs or what `models.forward` has computed within the model. `half` gathers in bfloat16 what is kept in float32.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for layer in [part for part in model.modules() if type(part).__name__ in (model._no_split_modules or ())]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    setattr(model, WITHIN, MethodType(_compute, model))
    register_fsdp_forward_method(model, WITHIN)


def _compute(model: nn.Module, compute: Callable[[], T]) -> T:
    return compute()
