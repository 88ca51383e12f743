"""The LightningDataModule: questions in the order of the curriculum."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
from lightning import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_rlvr.curriculum import AdaptiveSampler, Curriculum, CurriculumSampler, Scoring
from lightning_rlvr.curriculum.order import tie_break
from lightning_rlvr.curriculum.sampler import check_batch_size
from lightning_rlvr.models.cache import cache_root
from lightning_rlvr.models.length import check_length
from lightning_rlvr.training.experience import PromptBatch
from lightning_rlvr.training.scoring import QuestionScores
from lightning_rlvr.types import Prompt, Task, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_rlvr.training.module import RLVRModule

Split = Literal["train", "val", "test"]
SPLITS_OF: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    "score": ("train",),
}


class RLVRDataModule(LightningDataModule):
    """Questions for training, ordered by precomputed semantic entropy, and for evaluation.

    Everything that can be wrong with the data is found before any model is trained or loaded.

    Args:
        train, val, test: sources of questions. Without `test`, test and predict use `val`.
        group_size: responses sampled to each training question (G).
        prompts_per_batch: training questions in a rollout batch, over all processes (B).
        eval_samples: responses sampled to each held-out question.
        eval_prompts_per_batch: held-out questions sampled at a time; changes memory and speed only.
        curriculum: the order of training questions.
        scoring: how training questions are scored, where the order needs it.
        max_prompt_tokens: the most tokens that a prompt may have.
        long_prompts: whether a longer prompt is an error or is dropped, counted.
        unjudgeable: whether a question that the reward cannot judge (an unparsable gold answer) is an error or is
            dropped, counted.
        cache_dir: where scores are cached; by default $LIGHTNING_RLVR_CACHE or ~/.cache/lightning_rlvr.
        seed: of ties and shuffles.
    """

    def __init__(
        self,
        train: Task | None = None,
        val: Task | None = None,
        test: Task | None = None,
        group_size: int = 8,
        prompts_per_batch: int = 32,
        eval_samples: int = 8,
        eval_prompts_per_batch: int = 32,
        curriculum: Curriculum = Curriculum(),  # noqa: B008 - frozen
        scoring: Scoring = Scoring(),  # noqa: B008 - frozen
        max_prompt_tokens: int = 1024,
        long_prompts: Literal["error", "drop"] = "error",
        unjudgeable: Literal["error", "drop"] = "error",
        cache_dir: str | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if group_size < 2:
            raise UserError(
                f"group_size must be at least 2, got {group_size}: an advantage compares a response with the others "
                "to the same question. Set data.group_size."
            )
        for key, value in (
            ("prompts_per_batch", prompts_per_batch),
            ("eval_samples", eval_samples),
            ("eval_prompts_per_batch", eval_prompts_per_batch),
            ("max_prompt_tokens", max_prompt_tokens),
        ):
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}. Set data.{key}.")
        if seed < 0:
            raise UserError(f"seed must be 0 or more, got {seed}. Set data.seed.")
        self.tasks: dict[Split, Task | None] = {"train": train, "val": val, "test": test or val}
        self.group_size, self.prompts_per_batch = group_size, prompts_per_batch
        self.eval_samples, self.eval_prompts_per_batch = eval_samples, eval_prompts_per_batch
        self.curriculum, self.scoring = curriculum, scoring
        self.max_prompt_tokens, self.long_prompts, self.unjudgeable = max_prompt_tokens, long_prompts, unjudgeable
        self.cache_dir, self.seed = cache_root(cache_dir), seed
        self.questions: dict[Split, list[Prompt]] = {}
        self.longest: dict[Split, int] = {}  # tokens of a prompt
        self.score_table: pd.DataFrame | None = None
        self._question_scores: QuestionScores | None = None
        self.stages: list[np.ndarray] = []
        self.sampler: CurriculumSampler | None = None
        self._order: str | None = None  # fingerprint of the order trained on
        self._sampler_state: dict[str, Any] = {}  # of the run that is resumed

    # --- questions -------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Find what is wrong with the data before any work is done."""
        self.load(self._stage(), self._module())
        self._check(self._stage(), self._module())

    def setup(self, stage: str) -> None:
        """Have the questions of the stage at hand on this process."""
        self.load(self._stage(), self._module())

    def load(self, stage: str, module: RLVRModule) -> None:
        """Load and check the questions of `fit`, `validate`, `test`, `predict` or `score`.

        Raises: UserError that names the key, if a split is missing or empty, a prompt too long, a gold answer
            unparsable.
        """
        for split in SPLITS_OF[stage]:
            if split not in self.questions and not (stage == "fit" and split == "val" and self.tasks["val"] is None):
                self.questions[split] = self._load_split(split, module)

    def _check(self, stage: str, module: RLVRModule) -> None:
        """Find what the settings ask of the questions and cannot have: done once, on one process.

        Raises: UserError that names the key, if pass@k asks for more samples than there are, processes or stages for
            more questions, or the score file is another model's.
        """
        if stage in ("fit", "validate", "test") and max(module.pass_at, default=1) > self.eval_samples:
            raise UserError(
                f"pass@k needs at least k samples a question, got k={max(module.pass_at)} and {self.eval_samples} "
                "samples. Set data.eval_samples or model.pass_at."
            )
        world = self._trainer().world_size
        for split in SPLITS_OF[stage]:
            if split != "train" and len(self.questions.get(split, range(world))) < world:
                raise UserError(
                    f"data.{split} must have a question for each process ({world}), got {len(self.questions[split])}. "
                    f"Set data.{split} or trainer.devices."
                )
        if stage == "fit":
            self._check_curriculum(module)
            self.curriculum.check(len(self.questions["train"]))
            if not self.curriculum.orders_by_scores:
                self.curriculum.key(self.questions["train"], None)
            if self.curriculum.needs_scores and self.scoring.file is not None:
                self.question_scores(module).get(self.cache_dir)
            shared = {p.text for p in self.questions["train"]} & {p.text for p in self.questions.get("val", [])}
            if shared:
                rank_zero_warn(f"{len(shared)} held-out questions are also training questions: {min(shared)!r}, ...")

    def _check_curriculum(self, module: RLVRModule) -> None:
        scoring, curriculum, trainer = self.scoring, self.curriculum, self._trainer()
        check_batch_size(self.prompts_per_batch, trainer.world_size)
        limit = trainer.limit_train_batches
        if trainer.max_epochs != 1 and not (isinstance(limit, float) and limit == 1):
            raise UserError(
                f"limit_train_batches must be 1.0 with max_epochs {trainer.max_epochs}, got {limit}: each epoch would "
                "begin the curriculum anew. Set trainer.max_steps instead."
            )
        stored, fresh = (scoring.samples, scoring.temperature), (self.group_size, module.sampling.temperature)
        if curriculum.adaptive is not None and curriculum.order != "pass_rate" and stored != fresh:
            raise UserError(
                f"an adaptive curriculum compares stored with fresh estimates of entropy, so both need as many samples "
                f"at the same temperature: scores have {stored[0]} at {stored[1]}, training groups {fresh[0]} at "
                f"{fresh[1]}. Set data.scoring.samples and data.scoring.temperature to data.group_size and "
                "model.sampling.temperature."
            )

    def _load_split(self, split: Split, module: RLVRModule) -> list[Prompt]:
        task = self.tasks[split]
        if task is None:
            raise UserError(f"there are no {split} questions. Set data.{split}.")
        prompts = task.load()
        if not prompts:
            raise UserError(f"data.{split} has no questions: nothing could be sampled. Set data.{split}.")
        counts = Counter(prompt.uid for prompt in prompts)
        repeated = [uid for uid, count in counts.items() if count > 1]
        if repeated:
            raise UserError(
                f"the uids of questions must differ, but data.{split} has {repeated[0]!r} {counts[repeated[0]]} times: "
                f"randomness, scores and results are named by them. Set the uids of data.{split}."
            )
        if self.unjudgeable == "error":
            module.reward.check(prompts)
        else:
            gone = module.reward.unjudgeable(prompts)
            prompts = self._without(gone, prompts, split, "as the reward cannot judge them", "unjudgeable")
        tokenizer = module.policy_source.tokenizer()
        lengths = [len(module.prompt_format.encode(tokenizer, prompt.text)) for prompt in prompts]
        long = [i for i, length in enumerate(lengths) if length > self.max_prompt_tokens]
        if long and self.long_prompts == "error":
            raise UserError(
                f"prompts of data.{split} must have at most {self.max_prompt_tokens} tokens, but "
                f"{prompts[long[0]].uid} has {lengths[long[0]]} ({len(long)} of {len(prompts)} are too long). "
                "Set data.max_prompt_tokens, or data.long_prompts to drop."
            )
        self.longest[split] = max((length for length in lengths if length <= self.max_prompt_tokens), default=0)
        why = f"as they have more than {self.max_prompt_tokens} tokens"
        return self._without(long, prompts, split, why, "max_prompt_tokens")

    @staticmethod
    def _without(gone: Sequence[int], prompts: list[Prompt], split: Split, why: str, key: str) -> list[Prompt]:
        """Return the prompts but those at the given places, said and counted."""
        if len(gone) == len(prompts):
            raise UserError(f"all questions of data.{split} are dropped {why}: none is left. Set data.{key}.")
        if gone:
            rank_zero_info(f"data.{split}: dropped {len(gone)} of {len(prompts)} questions {why}")
        places = set(gone)
        return [prompt for i, prompt in enumerate(prompts) if i not in places]

    def check_length(self, split: Split, module: RLVRModule, model: PreTrainedModel) -> None:
        """Let a model answer the questions of a split. Raises: UserError if they and responses are too long for it."""
        name, sampling = ("sampling", module.sampling) if split == "train" else ("eval_sampling", module.eval_sampling)
        keys = f"model.{name}.max_new_tokens, or data.max_prompt_tokens with data.long_prompts drop"
        check_length(model, self.longest[split], sampling.max_new_tokens, keys)

    # --- scores ----------------------------------------------------------------------------------

    def question_scores(self, module: RLVRModule) -> QuestionScores:
        """Return what makes and reads the scores of the training questions."""
        known, trainer = self._question_scores, self._trainer()
        if known is None or known.module is not module or known.trainer is not trainer:  # to make it reads all prompts
            known = self._question_scores = QuestionScores(module, self.questions["train"], self.scoring, trainer)
        return known

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("the data module works within a Trainer: pass both to trainer.fit")
        return self.trainer

    def _module(self) -> RLVRModule:
        return cast("RLVRModule", self._trainer().lightning_module)

    def _stage(self) -> str:
        return TrainerFn(self._trainer().state.fn).value

    def state_dict(self) -> dict[str, Any]:
        """Return the fingerprint of the order, by which a resumed run knows that it continues the same one."""
        return {"order": self._order, "sampler": self.sampler.state_dict() if self.sampler else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the order of the run that is resumed."""
        self._order, self._sampler_state = state["order"], state["sampler"]

    # --- loaders ---------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Prompt]:
        """Return the batches of the curriculum, from the one after the last that was trained on."""
        module, prompts = self._module(), self.questions["train"]
        self.check_length("train", module, module.policy)
        self.score_table = self.question_scores(module).get(self.cache_dir) if self.curriculum.needs_scores else None
        for name, chosen in self.curriculum.dropped(self.score_table).items():
            rank_zero_info(f"data.curriculum.{name}: dropped {chosen.sum()} of {len(prompts)} questions")
        self.stages = self.curriculum.cut(prompts, self.score_table, self.seed)
        self.sampler = sampler = self._sampler(module.rollouts_done)
        if self._order not in (None, sampler.fingerprint()):
            raise UserError(
                "the checkpoint was trained on another order of questions, so its place in this one means nothing. Set "
                "data.train, data.curriculum, data.scoring, data.prompts_per_batch and data.seed as they were."
            )
        self._order = sampler.fingerprint()
        if self._sampler_state:
            sampler.load_state_dict(self._sampler_state)
            self._sampler_state = {}
        collate = partial(PromptBatch, samples=self.group_size)
        return DataLoader(cast("Dataset[Prompt]", prompts), batch_sampler=sampler, collate_fn=collate)

    def _sampler(self, start: int) -> CurriculumSampler:
        trainer, curriculum = self._trainer(), self.curriculum
        world = (trainer.global_rank, trainer.world_size)
        settings = (self.stages, curriculum.passes, self.prompts_per_batch, self.seed, *world, start)
        if curriculum.adaptive is None:
            return CurriculumSampler(*settings)
        prompts, table = self.questions["train"], self.score_table
        return AdaptiveSampler(
            *settings,
            key=curriculum.key(prompts, table),
            tie=tie_break(len(prompts), self.seed),
            last=curriculum.last(table, len(prompts)),
            adaptive=curriculum.adaptive,
        )

    def val_dataloader(self) -> DataLoader[Prompt] | list[DataLoader[Prompt]]:
        """Return the held-out questions; none if there is no `val`."""
        return self._eval_loader("val") if "val" in self.questions else []

    def test_dataloader(self) -> DataLoader[Prompt]:
        """Return the test questions."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """Return the test questions."""
        return self._eval_loader("test")

    def _eval_loader(self, split: Split) -> DataLoader[Prompt]:
        trainer, questions = self._trainer(), self.questions[split]
        self.check_length(split, self._module(), self._module().policy)
        least, uneven = divmod(len(questions), trainer.world_size)
        mine = cast("Dataset[Prompt]", questions[trainer.global_rank :: trainer.world_size])
        # Processes gather weights in parts together: who has a question more must not have a batch more.
        size = next(n for n in itertools.count(self.eval_prompts_per_batch) if not uneven or least % n)
        return DataLoader(mine, batch_size=size, collate_fn=partial(PromptBatch, samples=self.eval_samples))


def datamodule_of(trainer: Trainer) -> RLVRDataModule:
    """Return the data module that a trainer was started with."""
    return cast(RLVRDataModule, getattr(trainer, "datamodule"))  # noqa: B009 - set where types do not see it
