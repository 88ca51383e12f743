"""From the folders of runs to tables: pandas frames in, pandas frames out. What notebooks and reports are made of."""

from lightning_rlvr.analysis.entropy import Fit, Law, entropy_changes, entropy_law, fit_changes
from lightning_rlvr.analysis.runs import (
    held_out_metrics,
    is_kept,
    keep,
    read_held_out,
    read_manifest,
    read_runs,
    read_training,
    variants_of,
)
from lightning_rlvr.analysis.scores import answer_table, read_scores, stage_table
from lightning_rlvr.analysis.statistics import (
    Interval,
    bands,
    interval,
    paired,
    summarise,
    t_quantile,
    t_within,
)
from lightning_rlvr.analysis.tokens import class_table, position_table, read_ledger, text_table

__all__ = [
    "Fit",
    "Interval",
    "Law",
    "answer_table",
    "bands",
    "class_table",
    "entropy_changes",
    "entropy_law",
    "fit_changes",
    "held_out_metrics",
    "interval",
    "is_kept",
    "keep",
    "paired",
    "position_table",
    "read_held_out",
    "read_ledger",
    "read_manifest",
    "read_runs",
    "read_scores",
    "read_training",
    "stage_table",
    "summarise",
    "t_quantile",
    "t_within",
    "text_table",
    "variants_of",
]
