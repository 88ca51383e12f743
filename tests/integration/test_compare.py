"""`compare` on a rollout batch that `fit` saved."""

import shutil
import warnings

import pandas as pd
import pytest
import torch
from support import ROOT

from lightning_rlvr.__main__ import main
from lightning_rlvr.compare import compare, cosine_of, dot
from lightning_rlvr.objectives import GRPO, SENT, HighEntropyMask, KLCov
from lightning_rlvr.types import UserError


@pytest.fixture(scope="session")
def saved(tmp_path_factory, cache):
    from support import arguments

    run = tmp_path_factory.mktemp("replay") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
        # A policy of four steps is near the greatest entropy, where no step changes it to first order.
        taught = {"model__policy__init_args__steps": 40}
        main(arguments("fit", run, save_rollouts__every_n_batches=2, trainer__max_steps=2, **taught))
    (folder,) = (run / "rollouts").iterdir()
    return folder


@pytest.fixture(scope="session")
def spread_rewards(saved):
    """The same batch with rewards that differ: a policy of few steps earns none."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "batch.safetensors")
    tensors["score"] = (tensors["response_ids"].sum(1) % 3 == 0).float()
    save_file(tensors, saved / "batch.safetensors")
    return saved


def test_every_column_of_the_table_is_compared(spread_rewards, tmp_path, capsys):
    flags = ["--rollouts", str(spread_rewards), "--output", str(tmp_path)]
    main(["compare", "--config", str(ROOT / "configs" / "compare" / "paper_table.yaml"), *flags])
    table = pd.read_csv(tmp_path / "compare.csv", index_col=0)
    assert len(table) == 8
    assert (table["grad_norm"] > 0).all()
    said = capsys.readouterr().out
    assert "w/ SENT" in said
    assert "dH measured ┃ dH 1st order ┃ dH theory" in said
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_the_entropy_of_one_step_is_predicted(spread_rewards, tmp_path):
    table = compare(spread_rewards, {"GRPO": GRPO(), "mask": HighEntropyMask()}, tmp_path, eta=1e-2)
    for _, row in table.iterrows():
        predicted = row["entropy_change/first_order"]
        assert abs(predicted) > 1e-6  # an entropy in float32 is not told apart from less
        assert row["entropy_change/measured"] == pytest.approx(predicted, rel=0.1)


def test_the_cut_into_micro_batches_does_not_matter(spread_rewards, tmp_path):
    objectives = {"SENT": SENT(high_cov_fraction=0.1, beta_low=1.0, beta_high=2.0)}
    whole, cut = (compare(spread_rewards, objectives, tmp_path, micro_batch_size=n) for n in (100, 3))
    pd.testing.assert_frame_equal(whole, cut, rtol=1e-3, atol=1e-6)


def test_equal_objectives_have_equal_gradients_and_tokens(spread_rewards, tmp_path):
    compare(spread_rewards, {"a": SENT(), "b": SENT(), "c": GRPO()}, tmp_path)
    cosine = pd.read_csv(tmp_path / "cosine.csv", index_col=0)
    overlap = pd.read_csv(tmp_path / "overlap.csv", index_col=0)
    assert cosine.loc["a", "b"] == pytest.approx(1, abs=1e-12)
    assert overlap.loc["a", "b"] == 1
    assert overlap.loc["a", "c"] == 0


def test_sums_over_millions_of_parameters_are_exact():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2_500_000, generator=generator) + 1 for _ in range(2))
    assert dot(a, b) == pytest.approx(float(a.double() @ b.double()), rel=1e-12)
    assert cosine_of(a, -a) == pytest.approx(-1, abs=1e-12)


def test_a_term_that_cannot_act_is_named(spread_rewards, tmp_path):
    with pytest.warns(UserWarning, match=r"w/ Cov has a term that cannot act .* \|log r\|"):
        compare(spread_rewards, {"GRPO": GRPO(), "w/ Cov": KLCov()}, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compare(spread_rewards, {"GRPO": GRPO()}, tmp_path)


def test_a_batch_that_teaches_nothing_is_named_and_has_no_cosines(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    batch = shutil.copytree(saved, tmp_path / "batch")
    tensors = load_file(batch / "batch.safetensors")
    save_file(tensors | {"score": torch.ones_like(tensors["score"])}, batch / "batch.safetensors")
    with pytest.warns(UserWarning, match="equal rewards"):
        table = compare(batch, {"GRPO": GRPO()})
    assert table.loc["GRPO", "grad_norm"] == 0
    assert pd.read_csv(batch / "compare" / "cosine.csv", index_col=0).isna().all(axis=None)


@pytest.mark.parametrize(
    ("flags", "named"), [(["--micro_batch_size", "0"], "at least 1 row, got 0"), (["--output", "/proc/x"], "--output")]
)
def test_settings_are_refused_before_any_work(saved, capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--config", str(ROOT / "configs/compare/paper_table.yaml"), "--rollouts", str(saved), *flags])
    assert named in capsys.readouterr().err


def test_a_folder_without_rollouts_is_refused(tmp_path):
    with pytest.raises(UserError, match="save_rollouts"):
        compare(tmp_path, {"GRPO": GRPO()})


def test_objectives_are_needed(saved):
    with pytest.raises(UserError, match="objectives"):
        compare(saved, {})


def test_a_missing_reference_is_refused(cli, tmp_path):
    overlay = ROOT / "configs" / "objectives" / "grpo.yaml"
    run = cli("fit", tmp_path / "run", overlay, save_rollouts__every_n_batches=1, trainer__max_steps=1)
    with pytest.raises(UserError, match="reference"):
        compare(run / "rollouts" / "000001", {"SENT": SENT()})
