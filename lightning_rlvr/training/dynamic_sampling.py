"""Dynamic sampling: train on full batches of groups that teach something."""

from __future__ import annotations

from lightning_rlvr.rollout import concatenate
from lightning_rlvr.training.distributed import gather_objects, rank, world_size
from lightning_rlvr.training.experience import Experience


class GroupBuffer:
    """Collects groups whose rewards are not all equal until they fill a batch, those of all ranks together.

    All groups collected were sampled from the same policy, since it is updated only when the batch is full. After
    `max_batches` rollout batches, tied groups fill what is left: they have no advantage. Useful groups beyond a full
    batch are dropped, since the policy changes, and so is what is collected when the run ends. Groups come in the order
    of their questions, and are shared out anew: which ones are trained on does not depend on the number of ranks.

    Args:
        max_batches: the most rollout batches for one update.

    Source: DAPO, arXiv 2503.14476, section on dynamic sampling.
    """

    def __init__(self, max_batches: int) -> None:
        self.max_batches = max_batches
        self._groups: list[Experience] = []  # of this rank; each rank has as many
        self._tied: list[bool] = []
        self.wanted = 0  # groups of a rank in a full batch: as many as the largest rollout batch so far had
        self.batches = 0
        self.used = 0  # rollout batches that the last full batch took

    def add(self, experience: Experience, group_size: int) -> Experience | None:
        """Add a rollout batch; return this rank's part of a batch of as many groups once that is full, else None."""
        here = len(experience.verdicts) // group_size
        self.wanted = max(self.wanted, here)  # the last batch of a pass may be smaller
        for i in range(here):
            group = experience.rows(slice(i * group_size, (i + 1) * group_size))
            self._groups.append(group)
            self._tied.append(len({verdict.score for verdict in group.verdicts}) == 1)
        self.batches += 1
        tied = gather_objects(self._tied)
        places = [(owner, i) for i in range(len(self._tied)) for owner in range(world_size())]
        wanted = self.wanted * world_size()
        if self.batches < self.max_batches and len(places) - sum(map(sum, tied)) < wanted:
            return None
        groups = self._share(sorted(places, key=lambda place: tied[place[0]][place[1]])[:wanted])
        self._groups, self._tied, self.batches, self.used = [], [], 0, self.batches
        return Experience(
            prompts=[prompt for group in groups for prompt in group.prompts],
            rollouts=concatenate([group.rollouts for group in groups]),
            responses=[response for group in groups for response in group.responses],
            verdicts=[verdict for group in groups for verdict in group.verdicts],
            ids=[number for group in groups for number in group.ids],
        )

    def _share(self, chosen: list[tuple[int, int]]) -> list[Experience]:
        """Return every world-th of the chosen groups, from the rank-th on; each is named by its owner and its place."""
        here, world = rank(), world_size()
        given = {i: self._groups[i].to("cpu") for n, (owner, i) in enumerate(chosen) if owner == here != n % world}
        device = self._groups[0].rollouts.mask.device
        received = gather_objects(given)
        return [self._groups[i] if owner == here else received[owner][i].to(device) for owner, i in chosen[here::world]]
