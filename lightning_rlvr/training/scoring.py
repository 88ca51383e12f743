"""The scores of the training questions of a run: where they are, what they depend on, how all processes make them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_rlvr.curriculum import Scoring
from lightning_rlvr.curriculum import score as scores
from lightning_rlvr.models import Policy
from lightning_rlvr.rewards.identity import shown
from lightning_rlvr.rollout import ServedEngine, TransformersEngine
from lightning_rlvr.store import Store, user_path
from lightning_rlvr.training.distributed import all_ranks
from lightning_rlvr.types import Engine, Prompt, UserError

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule

POLL_S = 2.0  # between two looks at what other runs and ranks have done


class QuestionScores:
    """Scores of questions by the policy that a module starts from.

    Args:
        module: whose policy, prompt format, reward and response length they are of.
        prompts: the questions, in order.
        scoring: how they are scored.
        trainer: whose processes share the work.
    """

    def __init__(self, module: RLVRModule, prompts: list[Prompt], scoring: Scoring, trainer: Trainer) -> None:
        self.module, self.prompts, self.scoring, self.trainer = module, prompts, scoring, trainer
        tokenizer = module.policy_source.tokenizer()
        self.about = scores.manifest(
            prompts,
            partial(module.prompt_format.encode, tokenizer),
            module.policy_source.fingerprint(),
            str(trainer.precision),
            shown(module.prompt_format, "model.prompt_format"),
            shown(module.reward, "model.reward"),
            scoring,
            module.sampling.max_new_tokens,
        )

    def get(self, cache_dir: Path) -> pd.DataFrame:
        """Return the scores from the file named, the cache, or sampling.

        Raises: UserError if the named file was made for another model or other data; it says what differs.
        """
        if self.scoring.file is not None:
            return self.read(user_path(self.scoring.file, "data.scoring.file"), "data.scoring.file, or null to score")
        path = scores.cache_path(cache_dir, self.about)
        self.make(path, "data.cache_dir")
        return self.read(path, "data.cache_dir")

    def read(self, path: Path, setting: str) -> pd.DataFrame:
        """Read a finished file, in the order of the questions. Raises: UserError if it is of something else."""
        table = scores.read_scores(path, self.about, self.scoring.unparsable, setting)
        return table.set_index("uid").loc[[prompt.uid for prompt in self.prompts]].reset_index()

    def make(self, path: Path, setting: str) -> None:
        """Score the questions that a file still lacks, shared out over all processes.

        What is finished is kept, also if the process is killed: calling it again goes on from there. `setting` is how
        errors call what led to `path`. Raises: UserError if the file holds scores of something else.
        """
        strategy = self.trainer.strategy
        store = Store(path, self.about, setting, rank=self.trainer.global_rank)
        if strategy.broadcast(path.exists()):
            store.check()
            return
        self._claim(store)
        try:
            store.check()
            done = store.done()
            strategy.barrier("scores read")  # before any rank appends
            if len(done) < len(self.prompts):
                with self.module.clock.part("score"):
                    self._score(store, done)
                self._wait(store)
            strategy.barrier("scores made")
            if self.trainer.is_global_zero:
                store.finish([prompt.uid for prompt in self.prompts])
            strategy.barrier("scores written")
        finally:
            store.release()

    def _claim(self, store: Store) -> None:
        """Wait until no other run makes the same file, on all ranks alike."""
        zero, told = self.trainer.is_global_zero, False
        while not self.trainer.strategy.broadcast(not zero or store.try_claim()):
            if not told:
                rank_zero_info(f"another run is making {store.path}: waiting for it")
                told = True
            time.sleep(POLL_S)
        if not all_ranks(store.parts.parent.is_dir()):
            raise UserError(
                f"all processes must see one and the same folder for scores, but some do not see {store.path.parent}. "
                f"Set {store.setting}."
            )

    def _score(self, store: Store, done: set[str]) -> None:
        module = self.module
        with self._engine() as engine:
            scores.score_questions(
                self.prompts,
                module.encode,
                module.decode,
                engine,
                module.reward,
                self.scoring,
                module.sampling.max_new_tokens,
                store,
                done,
                self.trainer.world_size,
            )

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        """Give what samples: the server, or the policy with its weights whole."""
        if self.scoring.served is not None:
            yield ServedEngine(self.scoring.served, self.module.tokenizer)
            return
        policy = self._initial_policy()
        with self.module.parallel.whole(policy.model):
            yield TransformersEngine.of(policy, self.module.rollout_rows)

    def _initial_policy(self) -> Policy:
        """Return the policy that scores are of: a fresh copy, where the module's own has been trained already."""
        module = self.module
        if module.rollouts_done == 0:
            return Policy(module.policy, module.tokenizer)
        policy = module.policy_source.load()
        nn.Module.to(policy.model, device=module.device, dtype=module.policy.dtype)
        return policy

    def _wait(self, store: Store) -> None:
        """Wait for the shares of other ranks, however long: a barrier would give up after half an hour."""
        parent = os.getppid()
        while self.trainer.world_size > 1 and len(store.done()) < len(self.prompts):
            time.sleep(POLL_S)
            if os.getppid() != parent:
                raise RuntimeError("the process that started this one has ended, and with it the scoring")
