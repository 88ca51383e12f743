"""The sandbox as rewards use it: a level demanded, programs run at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_rlvr.rewards.sandbox.probe import Ground, Level, probe
from lightning_rlvr.rewards.sandbox.process import Limits, Process, Program, Run
from lightning_rlvr.types import UserError


@dataclass(frozen=True)
class Sandbox:
    """Runs programs at the level demanded, never below it. The machine is probed at the first use."""

    level: Literal["limited", "isolated"] = "isolated"

    def ground(self) -> Ground:
        """Return what the machine gives. Raises UserError if that is less than the level demanded."""
        ground = probe()
        if ground.level < Level[self.level]:
            raise UserError(
                f"level must be one that this machine gives, got {self.level!r}, and it gives {ground.level.name!r}: "
                f"{ground.missing}. Programs that a model wrote must be contained. Put that right, choose "
                "another reward or data set, or, having read in lightning_rlvr.rewards.sandbox what the lower level "
                "cannot contain, set CodeTests' level: reward.init_args.level."
            )
        return ground

    def start(self, program: Program, limits: Limits) -> Process:
        """Start a program; to be used in a `with`."""
        ground = self.ground()
        return Process(program, limits, ground.bwrap if self.level == "isolated" else None)

    def run(self, program: Program, limits: Limits) -> Run:
        """Run a program to its end."""
        with self.start(program, limits) as process:
            return process.finish()
