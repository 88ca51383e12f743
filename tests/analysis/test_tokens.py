"""Tables and figures of a token ledger."""

import math

import numpy as np
import pandas as pd
import pytest

from lightning_rlvr import analysis
from lightning_rlvr.analysis.pictures import along_the_text, entropy_and_covariance, token_map
from lightning_rlvr.types import UserError

CLASSES = {"a": "low", "b": "high", "$": ""}


@pytest.fixture
def run(tmp_path):
    """Two ledgers of 6 responses that read `aab$`, where `$` has most entropy; in the second, `a` has less."""
    (tmp_path / "ledger").mkdir()
    for batch, low in ((2, 0.1), (4, 0.01)):
        entropy = {"a": low, "b": 0.02, "$": 1.0}
        rows = [
            {
                "uid": f"q{i // 2}", "response": i % 2, "position": t, "text": text, "class": CLASSES[text],
                "entropy": entropy[text], "logp": -0.1, "ref_logp": -0.1 + (0.5 if text == "b" else 0.0),
                "covariance": 2.0 if text == "b" else 0.0, "kl_weight": 0.2 if text == "b" else 0.0,
            }
            for i in range(6)
            for t, text in enumerate("aab$")
        ]  # fmt: skip
        pd.DataFrame(rows).to_parquet(tmp_path / "ledger" / f"{batch:06d}.parquet")
    return tmp_path


def test_the_last_ledger_is_read_or_the_one_asked_for(run):
    last, first = analysis.read_ledger(run), analysis.read_ledger(run, 2)
    assert len(last) == len(first) == 24
    assert (last["entropy"].min(), first["entropy"].min()) == (0.01, 0.02)
    assert set(last["class"]) == {"low", "high", "none"}
    assert last.loc[last["text"] == "b", "kl"].tolist() == pytest.approx([math.exp(0.5) - 1.5] * 6)


def test_a_run_without_that_ledger_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"\(2, 4 there\), got 3: .*Set ledger\.every_n_batches"):
        analysis.read_ledger(run, 3)
    with pytest.raises(UserError, match=r"none there"):
        analysis.read_ledger(tmp_path / "nowhere")


def test_classes_have_their_shares_and_means(run):
    table = analysis.class_table(analysis.read_ledger(run))
    assert table.index.tolist() == ["low", "high", "none"], "by entropy"
    assert table["tokens"].tolist() == [12, 6, 6]
    assert table["share"].tolist() == [0.5, 0.25, 0.25]
    assert table.loc["high", ["covariance", "kl_weight"]].tolist() == pytest.approx([2.0, 0.2])


def test_texts_are_ordered_by_entropy_and_rare_ones_are_left_out(run):
    ledger = analysis.read_ledger(run)
    assert analysis.text_table(ledger, least=6).index.tolist() == ["a", "b", "$"]
    (only,) = analysis.text_table(ledger).itertuples()
    assert (only.Index, only.tokens, only.low, only.high) == ("a", 12, 1.0, 0.0)


def test_positions_have_the_tokens_there(run):
    table = analysis.position_table(analysis.read_ledger(run))
    assert table["tokens"].tolist() == [6] * 4
    assert table["low"].tolist() == [1, 1, 0, 0]
    assert table["entropy"].tolist() == pytest.approx([0.01, 0.01, 0.02, 1.0])


def test_figures_hold_every_token(run):
    ledger = analysis.read_ledger(run)
    scatter, histogram = entropy_and_covariance(ledger).axes
    assert sum(len(dots.get_offsets()) for dots in scatter.collections) == 24
    assert sum(patch.get_height() for patch in histogram.patches) == 24
    line, shares = along_the_text(ledger).axes
    assert line.lines[0].get_ydata().tolist() == pytest.approx([0.01, 0.01, 0.02, 1.0])
    assert len(shares.collections) == 3


def test_the_map_shows_texts_where_they_stand_and_frames_the_narrowest_class(run):
    axes = token_map(analysis.read_ledger(run), responses=3).axes[0]
    assert [text.get_text() for text in axes.texts[:4]] == ["a", "a", "b", "$"]
    assert axes.images[0].get_array().shape == (3, 4)
    assert np.allclose([patch.get_xy()[0] for patch in axes.patches], 2 - 0.46), "each `b`"
    assert len(axes.patches) == 3
    narrow = token_map(analysis.read_ledger(run), width=2).axes[0]
    assert narrow.images[0].get_array().shape == (6, 2)


def test_responses_with_framed_tokens_come_first(run):
    ledger = analysis.read_ledger(run)
    ledger.loc[(ledger["uid"] != "q2") & (ledger["class"] == "high"), "class"] = "low"
    labels = [label.get_text() for label in token_map(ledger, responses=3).axes[0].get_yticklabels()]
    assert labels == ["…q2 #0", "…q2 #1", "…q0 #0"]
