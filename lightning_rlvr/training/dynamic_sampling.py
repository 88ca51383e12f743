"""Dynamic sampling: train on full batches of groups that teach something."""

from __future__ import annotations

from lightning_rlvr.rollout import concatenate
from lightning_rlvr.training.distributed import all_ranks
from lightning_rlvr.training.experience import Experience


class GroupBuffer:
    """Collects groups whose rewards are not all equal until they fill a batch.

    All groups collected were sampled from the same policy, since it is updated only when the batch is full. After
    `max_batches` rollout batches, tied groups fill what is left: they have no advantage. Useful groups beyond a full
    batch are dropped, since the policy changes, and so is what is collected when the run ends.

    Args:
        max_batches: the most rollout batches for one update.

    Source: DAPO, arXiv 2503.14476, section on dynamic sampling.
    """

    def __init__(self, max_batches: int) -> None:
        self.max_batches = max_batches
        self._useful: list[Experience] = []
        self._tied: list[Experience] = []
        self.wanted = 0  # groups in a full batch: as many as the largest rollout batch so far had
        self.batches = 0
        self.used = 0  # rollout batches that the last full batch took

    def add(self, experience: Experience, group_size: int) -> Experience | None:
        """Add a rollout batch; return a batch of as many groups once it is full on all ranks, else None."""
        here = len(experience.verdicts) // group_size
        wanted = self.wanted = max(self.wanted, here)  # the last batch of a pass may be smaller
        for i in range(here):
            group = experience.rows(slice(i * group_size, (i + 1) * group_size))
            tied = len({verdict.score for verdict in group.verdicts}) == 1
            (self._tied if tied else self._useful).append(group)
        self.batches += 1
        if self.batches < self.max_batches and not all_ranks(len(self._useful) >= wanted):
            return None
        groups = (self._useful + self._tied)[:wanted]
        self._useful, self._tied, self.batches, self.used = [], [], 0, self.batches
        return Experience(
            prompts=[prompt for group in groups for prompt in group.prompts],
            rollouts=concatenate([group.rollouts for group in groups]),
            responses=[response for group in groups for response in group.responses],
            verdicts=[verdict for group in groups for verdict in group.verdicts],
            ids=[number for group in groups for number in group.ids],
        )
