"""Models on benchmarks: sample, judge, measure, report."""

from lightning_rlvr.evaluation.benchmark import Benchmark, read_benchmark
from lightning_rlvr.evaluation.command import evaluate, main
from lightning_rlvr.evaluation.report import Report

__all__ = ["Benchmark", "Report", "evaluate", "main", "read_benchmark"]
