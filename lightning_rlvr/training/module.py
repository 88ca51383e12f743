"""The LightningModule: the only place where the stages of reinforcement learning are joined."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lightning_rlvr.curriculum import CurriculumSampler
from lightning_rlvr.metrics import EvaluationMetrics
from lightning_rlvr.models import Policy, PolicySource, PromptFormat
from lightning_rlvr.models.forward import TokenValues, batch_logp, micro_batches
from lightning_rlvr.models.lora import adapted, frozen
from lightning_rlvr.models.source import decode
from lightning_rlvr.ops.advantages import group_advantages
from lightning_rlvr.rewards import verdicts_of
from lightning_rlvr.rollout import VLLM, TransformersEngine, VLLMEngine, seed_of
from lightning_rlvr.training.checkpoint import COUNTS, check_checkpoint
from lightning_rlvr.training.clock import Clock
from lightning_rlvr.training.distributed import all_ranks, gather_stats, reduce_ratios, world_size
from lightning_rlvr.training.dynamic_sampling import GroupBuffer
from lightning_rlvr.training.experience import (
    Experience,
    PromptBatch,
    StepObserver,
    StepRecord,
    describe,
    pull_covariance,
)
from lightning_rlvr.training.mismatch import check_agreement, corrected
from lightning_rlvr.training.numbers import total, without_nan
from lightning_rlvr.training.parallel import Parallel, parallel_of
from lightning_rlvr.training.update import in_micro_batches, update_policy
from lightning_rlvr.types import (
    Objective,
    Ratio,
    Response,
    Reward,
    Rollouts,
    Sampling,
    TokenPlan,
    TokenStats,
    UserError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RATED = ("rollout", "reward", "statistics", "reference", "update", "logging")  # parts of a step
RECORDING_TOLERANCE = 1e-4  # nats: how far a token's recorded values may lie from recomputed ones to stand for them


class RLVRModule(LightningModule):
    """A policy trained with verifiable rewards against a frozen reference.

    One training step is one rollout batch: rollout, reward, advantage, token statistics, plan, and
    `updates_per_rollout` optimizer steps. Statistics and plan see the whole batch over all ranks, so no result
    depends on `micro_batch_size`, `rollout_rows` or the number of processes.

    Args:
        policy: where the policy comes from; the reference is the same policy, frozen.
        objective: what is maximised.
        reward: judges responses.
        sampling: of training responses; temperature applies to the policy wherever its probabilities are read.
        eval_sampling: of validation, test and predict; the training one if not given.
        prompt_format: how a question becomes a prompt.
        optimizer, lr_scheduler: called with the policy's parameters, and with the optimizer; the schedule
            steps with the optimizer.
        updates_per_rollout: optimizer steps on one rollout batch, on disjoint questions. Each process cuts its own
            questions: they are those of one process if their number divides by steps times processes.
        micro_batch_size: rows of the greatest length in a forward and backward pass; shorter ones fill it by their
            tokens, a prompt counting once for its responses. It changes memory and speed only.
        recompute_logp: whether the log-probabilities and entropies of a rollout batch are computed anew for its
            statistics, or those are taken that were recorded while sampling. auto computes them for the first rollout
            batch and takes the recorded ones, then too, if no token's differ by more than 1e-4 nats.
        rollout_rows: rows decoded at a time; changes memory and speed only.
        vllm: samples with vLLM instead of this package's engine; see `VLLM`.
        dynamic_sampling: if not 0, groups whose rewards are all equal are replaced by groups of the next questions,
            from at most that many rollout batches for one update (DAPO).
        max_grad_norm: bound on the norm of the gradient, null for none.
        max_skipped_updates: updates in a row that may be left out, since their loss or gradient is nan or inf, before
            the run ends with an error.
        offload_reference: keep the reference in the CPU's memory but for its pass over each rollout batch.
        pass_at: the k of each pass@k that validation and test report.
        seed: names all randomness of rollouts.

    Source: SENT, arXiv 2512.04359.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None

    def __init__(
        self,
        policy: PolicySource,
        objective: Objective,
        reward: Reward,
        sampling: Sampling,
        eval_sampling: Sampling | None = None,
        prompt_format: PromptFormat = PromptFormat(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        updates_per_rollout: int = 1,
        micro_batch_size: int = 32,
        rollout_rows: int = 256,
        vllm: VLLM | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_updates: int = 3,
        recompute_logp: bool | Literal["auto"] = "auto",
        dynamic_sampling: int = 0,
        offload_reference: bool = False,
        pass_at: list[int] = [8],  # noqa: B006 - never changed
        seed: int = 1,
    ) -> None:
        super().__init__()
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise UserError(
                f"max_grad_norm must be positive, or null for no bound, got {max_grad_norm}: the gradient is scaled "
                "down to this norm. Set model.max_grad_norm."
            )
        if dynamic_sampling < 0:
            raise UserError(
                f"dynamic_sampling must be 0 (off) or a number of rollout batches, got {dynamic_sampling}. "
                "Set model.dynamic_sampling."
            )
        if offload_reference and objective.needs_full_kl:
            raise UserError(
                "offload_reference must be false with kl_estimator full, got true: every micro-batch reads the "
                "reference. Set model.offload_reference, or model.objective.init_args.kl_estimator."
            )
        for key, value in (
            ("updates_per_rollout", updates_per_rollout),
            ("micro_batch_size", micro_batch_size),
            ("rollout_rows", rollout_rows),
            ("max_skipped_updates", max_skipped_updates),
            *(("pass_at", k) for k in pass_at),
        ):
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}. Set model.{key}.")
        if sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k > 0:
            raise UserError(
                f"training responses must be sampled from the policy itself, got {sampling}: with greedy, top-p or "
                "top-k sampling the probability ratio is not the policy's. Set model.sampling to temperature > 0, "
                "top_p 1, top_k 0; model.eval_sampling is free."
            )
        if vllm is not None and recompute_logp is False:
            raise UserError(
                "recompute_logp must be auto or true with model.vllm, got false: vLLM's log-probabilities are not "
                "those of training, and it tells no entropy. Set model.recompute_logp."
            )
        self.automatic_optimization = False
        self.strict_loading = False  # the reference is not in checkpoints while it is the initial policy
        self.policy_source, self.objective, self.reward = policy, objective, reward
        self.sampling, self.eval_sampling = sampling, eval_sampling or sampling
        self.prompt_format = prompt_format
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.updates_per_rollout, self.micro_batch_size = updates_per_rollout, micro_batch_size
        self.rollout_rows, self.max_grad_norm, self.pass_at = rollout_rows, max_grad_norm, pass_at
        self.vllm, self._vllm_engine = vllm, cast("VLLMEngine | None", None)
        self.seed, self.offload_reference = seed, offload_reference
        self.max_skipped_updates, self.skipped_in_a_row = max_skipped_updates, 0
        self.parallel = Parallel(self)
        self.rollouts_done = 0  # rollout batches so far: names the randomness of the next
        self.groups = GroupBuffer(dynamic_sampling) if dynamic_sampling else None
        self.batches_trained = 0  # fewer than rollouts_done with dynamic sampling
        self.objective_state = objective.initial_state()
        self.recompute_logp = recompute_logp
        self.recording_agrees: bool | None = None  # with a recomputation, once that is known
        self.reference_moved = False  # by a restart at a stage boundary
        self.clock = Clock()
        self._logged_seconds: dict[str, float] = {}
        self.val_metrics, self.test_metrics = EvaluationMetrics(pass_at), EvaluationMetrics(pass_at)

    # --- the models ------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Do the policy's slow preparation, if it has one, once and on one process."""
        with self.clock.part("warm_start"):
            self.policy_source.prepare()

    def setup(self, stage: str) -> None:
        """Load the models before DeepSpeed would have each of their modules made in parts."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.configure_model()

    def configure_model(self) -> None:
        """Load the policy and, if the objective reads it, the frozen reference; shard them if the strategy does."""
        if hasattr(self, "policy"):
            return
        self.policy, self.tokenizer = self.policy_source.load()
        self.reference = frozen(self.policy) if self.objective.needs_reference else None
        self.parallel = parallel_of(self)

    def on_fit_start(self) -> None:
        """Refuse what cannot be right; take the reference off the device if it is not to stay there.

        Float16's loss scaling would also scale the gradient norm that is bounded and logged.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError("precision 16-mixed is not supported: gradients would be clipped scaled. Set bf16-mixed.")
        if self.offload_reference and self.reference is not None:
            if adapted(self.policy):
                raise UserError(
                    "offload_reference must be false for a policy with adapters, got true: the reference is the "
                    "weights beneath them and takes no memory. Set model.offload_reference."
                )
            nn.Module.to(self.reference, "cpu")

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the policy's parameters, with its schedule if there is one."""
        try:
            optimizer = self._optimizer(self.policy.parameters())
            schedules = [] if self._lr_scheduler is None else [self._lr_scheduler(optimizer)]
        except ValueError as error:
            raise UserError(f"{error}. Set model.optimizer or model.lr_scheduler.") from error
        parts: list[Any] = [optimizer, *schedules]
        self._fresh = copy.deepcopy([part.state_dict() for part in parts])
        return [optimizer], schedules

    def restart(self) -> None:
        """Start optimizer and schedule anew, and take the policy as it is now as the reference."""
        parts: list[Any] = [cast(LightningOptimizer, self.optimizers()).optimizer, self.lr_schedulers()]
        for part, fresh in zip(parts, self._fresh, strict=False):  # without a schedule there is one state only
            part.load_state_dict(copy.deepcopy(fresh))
        self.reference_moved = True
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())

    @property
    def engine(self) -> TransformersEngine | VLLMEngine:
        """The engine that samples from the policy as it is now."""
        policy = Policy(self.policy, self.tokenizer)
        if self.vllm is None:
            return TransformersEngine.of(policy, self.rollout_rows)
        if self._vllm_engine is None:
            self._vllm_engine = VLLMEngine(policy, self.vllm, self.rollout_rows)
        return self._vllm_engine

    @property
    def sampler(self) -> CurriculumSampler | None:
        """The order of the training questions, if it is a curriculum's."""
        sampler = getattr(self.trainer.train_dataloader, "batch_sampler", None)
        return sampler if isinstance(sampler, CurriculumSampler) else None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the prompt for a question."""
        return self.prompt_format.encode(self.tokenizer, text)

    def decode(self, rollouts: Rollouts) -> list[Response]:
        """Return the texts of the responses, without special tokens."""
        return decode(self.tokenizer, rollouts)

    # --- one training step -----------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Train on one rollout batch: sample, judge, measure every token, plan, update."""
        with self.clock.part("step"):
            experience = self.experience(batch, self.sampling, f"rollout {self.rollouts_done}")
            callbacks: list[Callback] = getattr(self.trainer, "callbacks")  # noqa: B009 - set where types do not see it
            observers = [callback for callback in callbacks if isinstance(callback, StepObserver)]
            for observer in observers:
                observer.on_sampled(self, batch, experience)
            self.rollouts_done += 1
            if self.groups is not None:
                full = self.groups.add(experience, batch.samples)
                if full is None:
                    return {"samples": []}
                experience = full
            with self.clock.part("statistics"):
                stats = self.token_statistics(experience, batch.samples)
                plan = self.plan(stats)
                mismatch: dict[str, Ratio] = {}
                if self.vllm is not None:
                    plan, mismatch = corrected(experience.rollouts, stats, plan, self.vllm.max_importance)
            ref_logp = None
            if self.objective.needs_reference:
                with self.clock.part("reference"):
                    ref_logp = self.reference_logp(experience.rollouts, stats.update)
            self.batches_trained += 1
            record = StepRecord(experience, stats, plan, ref_logp, batch.samples, self.batches_trained)
            with self.clock.part("logging"):
                for observer in observers:
                    observer.on_planned(self, record)
            with self.clock.part("update"):
                metrics, clipped = update_policy(self, record)
            with self.clock.part("logging"):
                for observer in observers:
                    observer.on_updated(self, record, clipped)
                metrics |= mismatch | describe(experience, stats, plan, batch.samples)
                metrics["covariance"] = pull_covariance(self.objective, record)
                for name in ("micro_batch_size", "rollout_rows"):  # smaller than asked for where memory ran out
                    metrics[name] = Ratio(torch.tensor(getattr(self, name)), torch.tensor(1))
                if self.groups is not None:
                    metrics["rollout_batches"] = Ratio(torch.tensor(self.groups.used), torch.tensor(1))
                reduced = reduce_ratios(metrics)
        spent = {k: total - self._logged_seconds.get(k, 0.0) for k, total in self.clock.seconds.items()}
        self._logged_seconds = dict(self.clock.seconds)
        with self.clock.part("logging"):  # counted in the next step
            self.log_training(reduced, spent, int(stats.mask.sum()))
        return {"samples": experience.samples()}

    def experience(self, batch: PromptBatch, sampling: Sampling, purpose: str) -> Experience:
        """Sample responses to each question and judge them. `purpose` names the randomness."""
        with self.clock.part("rollout"):
            prompts = [self.encode(prompt.text) for prompt in batch.prompts]
            seeds = [seed_of(self.seed, purpose, prompt.uid) for prompt in batch.prompts]
            engine = self.engine
            # Weights that were gathered in the inference mode of a validation could not be trained.
            with torch.inference_mode(False), torch.no_grad(), self.parallel.whole(self.policy):
                rollouts = engine.generate(prompts, seeds, batch.samples, sampling)
            self.rollout_rows = engine.max_rows
            responses = self.decode(rollouts)
        repeated = [prompt for prompt in batch.prompts for _ in range(batch.samples)]
        with self.clock.part("reward"):
            verdicts = verdicts_of(self.reward, responses, repeated)
        ids = [seed_of(seed, number) for seed in seeds for number in range(batch.samples)]
        return Experience(repeated, rollouts, responses, verdicts, ids)

    def token_statistics(self, experience: Experience, group_size: int) -> TokenStats:
        """Give entropy, log-probability and advantage of every token of this rank's rows, detached."""
        rollouts = experience.rollouts
        questions = len(experience.verdicts) // group_size
        updates = min(self.updates_per_rollout, questions)
        update = (torch.arange(questions, device=self.device) * updates // questions).repeat_interleave(group_size)
        logp, entropy = self._token_values(rollouts, update)
        scores = logp.new_tensor([verdict.score for verdict in experience.verdicts]).view(-1, group_size)
        return TokenStats(
            logp=logp,
            entropy=entropy,
            advantage=group_advantages(scores, self.objective.scale_by_std).flatten(),
            mask=rollouts.mask,
            row_id=torch.tensor(experience.ids, device=logp.device),
            update=update,
        )

    @torch.no_grad()
    def _token_values(self, rollouts: Rollouts, update: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of each token [N, T], recorded or computed anew."""
        recorded = rollouts.logp, rollouts.entropy
        if self.recompute_logp is False or (self.recompute_logp == "auto" and self.recording_agrees):
            return recorded
        logp, entropy, _ = self._batch_logp(self.policy, rollouts, update, with_entropy=True)
        assert entropy is not None
        if self.recording_agrees is None:
            if self.vllm is not None:
                check_agreement(rollouts, logp, self.vllm.tolerance, self.tokenizer)
            gap = torch.stack([(logp - recorded[0]).abs().max(), (entropy - recorded[1]).abs().max()]).max()
            self.recording_agrees = all_ranks(bool(gap <= RECORDING_TOLERANCE))
        return recorded if self.recompute_logp == "auto" and self.recording_agrees else (logp, entropy)

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Let the objective decide over the rollout batch of all ranks; return its plan for this rank's rows.

        Here entropy and the covariance of advantage and log-probability become KL masks.
        """
        whole, mine = gather_stats(replace(stats, state=self.objective_state))
        if total(whole).isfinite():
            self.objective_state = self.objective.next_state(self.objective_state, whole)
        else:
            whole = without_nan(whole)
        return self.objective.plan(whole).rows(mine).width(stats.mask.shape[1])

    def reference_logp(self, rollouts: Rollouts, update: Tensor) -> Tensor:
        """Return log-probabilities under the frozen reference [N, T].

        Each row is computed with the rows beside which it is trained: a policy that is its reference equals it to the
        bit, and the KL has no gradient.
        """
        assert self.reference is not None
        if self.offload_reference:
            nn.Module.to(self.reference, self.device)
        logp = self._batch_logp(self.reference, rollouts, update).logp
        if self.offload_reference:
            nn.Module.to(self.reference, "cpu")
        return logp

    def _batch_logp(
        self, model: PreTrainedModel, rollouts: Rollouts, update: Tensor, with_entropy: bool = False
    ) -> TokenValues:
        """Return the values of all tokens without gradients; no micro-batch spans two optimizer steps."""
        steps = [(update == number).nonzero().squeeze(-1) for number in range(int(update.max()) + 1)]

        def compute(size: int) -> TokenValues:
            parts = [part for rows in steps for part in micro_batches(self.policy, rollouts, rows, size)]
            return batch_logp(model, rollouts, self.sampling.temperature, parts, with_entropy)

        values = in_micro_batches(self, compute)
        self.parallel.release(model)
        return values

    def log_training(self, metrics: Mapping[str, float], spent: Mapping[str, float], tokens: int) -> None:
        """Log one step: metrics under train/, seconds and trained tokens a second by part of the work."""
        rates = {part: tokens * world_size() / spent[part] for part in RATED if spent.get(part)}
        rate = tokens * world_size() / spent["step"]
        shown = {"reward": metrics["reward"], "entropy": metrics["entropy"], "tok/s": rate}
        self.log_dict({f"train/{k}": v for k, v in metrics.items()}, batch_size=1)
        self.log_dict({f"seconds/{k}": v for k, v in spent.items()}, batch_size=1)
        self.log_dict({f"tokens_per_second/{k}": v for k, v in rates.items()}, batch_size=1)
        self.log("train/tokens_per_second", rate, batch_size=1)
        if self.sampler is not None:
            self.log("train/stage", float(self.sampler.batch(self.rollouts_done - 1).stage), batch_size=1)
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)

    # --- evaluation ------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample responses to held-out questions. The randomness is the same at every validation."""
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample responses to test questions."""
        return self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one record for each sampled response."""
        return self.experience(batch, self.eval_sampling, "evaluate").samples()

    def _evaluate(self, batch: PromptBatch, metrics: EvaluationMetrics) -> dict[str, Any]:
        with self.clock.part("evaluation", closed=True):
            experience = self.experience(batch, self.eval_sampling, "evaluate")
            metrics.update(experience.rollouts, experience.verdicts, batch.samples)
        return {"samples": experience.samples()}

    def on_validation_epoch_end(self) -> None:
        """Log pass@k, avg@k and what belongs to them, over all held-out questions."""
        self._log_evaluation(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Log pass@k, avg@k and what belongs to them, over all test questions."""
        self._log_evaluation(self.test_metrics, "test")

    def _log_evaluation(self, metrics: EvaluationMetrics, prefix: str) -> None:
        self.log_dict({f"{prefix}/{name}": value for name, value in metrics.compute().items()}, batch_size=1)
        metrics.reset()

    # --- Lightning -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what the policy's source gives again; keep what names the next step."""
        given = self._given(self.reference_moved)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in given}
        checkpoint |= {name: getattr(self, name) for name in COUNTS}
        checkpoint["groups_wanted"] = None if self.groups is None else self.groups.wanted
        checkpoint["seconds"] = dict(self.clock.seconds)

    def _given(self, reference_moved: bool) -> set[str]:
        """Return the names of weights that are never trained; a reference that has moved is the run's own."""
        named = self.named_parameters(remove_duplicate=False)
        given = {name for name, weight in named if not weight.requires_grad}
        return {name for name in given if not (reference_moved and name.startswith("reference."))}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counts of a checkpoint of this policy and objective. Raises: UserError if it is of another."""
        given = self._given(checkpoint.get("reference_moved", False))
        weights = {name: weight for name, weight in self.state_dict().items() if name not in given}
        check_checkpoint(checkpoint, weights, self.objective_state)
        for name in COUNTS:
            setattr(self, name, checkpoint[name])
        if self.groups is not None:
            self.groups.wanted = checkpoint["groups_wanted"] or 0
        self._logged_seconds = checkpoint["seconds"]
        self.clock.add(checkpoint["seconds"])

    def teardown(self, stage: str) -> None:
        """Release the verifier's processes."""
        self.reward.close()
