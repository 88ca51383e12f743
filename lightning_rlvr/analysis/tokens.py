"""The token ledger of a run: which tokens are of low entropy, which covary, and where they stand in a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from lightning_rlvr.types import UserError

NO_CLASS = "none"


def read_ledger(run: Path, batch: int | None = None) -> pd.DataFrame:
    """Return every token of a rollout batch, the last one written unless `batch` names another.

    Columns are those of `TokenLedger`; `class` is "none" where no class of the plan holds the token, and kl is the k3
    estimate to the reference (nats; nan without one).

    Raises: UserError if the run left no ledger of that batch.
    """
    files = sorted((run / "ledger").glob("[0-9]*.parquet"))
    chosen = files[-1:] if batch is None else [file for file in files if int(file.stem) == batch]
    if not chosen:
        there = ", ".join(str(int(file.stem)) for file in files) or "none"
        raise UserError(
            f"{run} must hold the ledger of a rollout batch ({there} there), got {batch or 'no batch'}: fit writes "
            "ledgers where it is asked to. Set ledger.every_n_batches."
        )
    table = pd.read_parquet(chosen[0])
    d = table["ref_logp"] - table["logp"]
    return table.assign(kl=np.expm1(d) - d, **{"class": table["class"].replace("", NO_CLASS)})


def class_table(ledger: pd.DataFrame) -> pd.DataFrame:
    """Return for each class of tokens: how many, their share, and means of what is known of them.

    Columns: tokens, share, entropy, logp, kl (nats), covariance, kl_weight.
    """
    grouped = ledger.groupby("class")
    means = grouped[["entropy", "logp", "kl", "covariance", "kl_weight"]].mean()
    means.insert(0, "tokens", grouped.size())
    means.insert(1, "share", means["tokens"] / len(ledger))
    return means.sort_values("entropy")


def text_table(ledger: pd.DataFrame, least: int = 10) -> pd.DataFrame:
    """Return for each token text that occurs at least so often: its number, mean entropy and covariance, class shares.

    Sorted by entropy, ascending. Columns: tokens, entropy (nats), covariance, and for each class its share.
    """
    grouped = ledger.groupby("text")
    table = grouped[["entropy", "covariance"]].mean()
    table.insert(0, "tokens", grouped.size())
    shares = pd.crosstab(ledger["text"], ledger["class"], normalize="index")
    return table.join(shares)[table["tokens"] >= least].sort_values("entropy")


def position_table(ledger: pd.DataFrame) -> pd.DataFrame:
    """Return for each position in a response: tokens there, their mean entropy and covariance, and class shares."""
    grouped = ledger.groupby("position")
    table = grouped[["entropy", "covariance"]].mean()
    table.insert(0, "tokens", grouped.size())
    return table.join(pd.crosstab(ledger["position"], ledger["class"], normalize="index"))
