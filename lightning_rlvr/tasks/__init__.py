"""Where questions come from."""

from lightning_rlvr.tasks.files import Files
from lightning_rlvr.tasks.hub import HubDataset
from lightning_rlvr.tasks.human_eval import HumanEval
from lightning_rlvr.tasks.puzzles import Countdown, MakeNumber
from lightning_rlvr.tasks.reasoning_gym import ReasoningGym
from lightning_rlvr.tasks.worked import WorkedChainSum

__all__ = ["Countdown", "Files", "HubDataset", "HumanEval", "MakeNumber", "ReasoningGym", "WorkedChainSum"]
