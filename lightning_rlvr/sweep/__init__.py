"""`python -m lightning_rlvr sweep`: from one experiment file to all its runs."""

from lightning_rlvr.sweep.command import main, sweep
from lightning_rlvr.sweep.experiment import Experiment, Run, read_experiment

__all__ = ["Experiment", "Run", "main", "read_experiment", "sweep"]
