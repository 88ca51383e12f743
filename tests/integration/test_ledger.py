"""The token ledger of a run, as a table and as a page in a real browser."""

import json
import math
import re
import shutil
import subprocess

import pandas as pd
import pytest
from support import arguments, browser, opened

from lightning_rlvr.training.callbacks.ledger import NUMBERS, PAGE, ledger_page


@pytest.fixture(scope="session")
def ledger(tmp_path_factory, cache):
    from lightning_rlvr.__main__ import main

    run = tmp_path_factory.mktemp("ledger") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
        main(arguments("fit", run, ledger__every_n_batches=2, trainer__max_steps=2))
    return run


def test_each_counted_token_has_a_row(ledger):
    table = pd.read_parquet(ledger / "ledger" / "000002.parquet")
    metrics = pd.read_csv(ledger / "metrics.csv").dropna(subset=["train/entropy"]).iloc[1]
    assert len(table) == round(metrics["train/response_length"] * 16)
    assert not table.duplicated(["uid", "response", "position"]).any()
    assert {"token_id", "text", "class", *NUMBERS} <= set(table.columns)


def test_its_values_are_those_of_the_step(ledger):
    table = pd.read_parquet(ledger / "ledger" / "000002.parquet")
    metrics = pd.read_csv(ledger / "metrics.csv").dropna(subset=["train/entropy"]).iloc[1]
    assert table["entropy"].mean() == pytest.approx(metrics["train/entropy"], rel=1e-5)
    assert (table["class"] == "high").mean() == pytest.approx(metrics["train/share/high"], rel=1e-5)
    assert (table["class"] != "").mean() == pytest.approx(metrics["train/share/low"], rel=1e-5)
    d = table["ref_logp"] - table["logp"]
    assert (d.map(math.expm1) - d).mean() == pytest.approx(metrics["train/kl/all"], rel=0.05)
    wanted = {"": 0.0, "low": 0.05, "high": 0.2}
    assert table["kl_weight"].tolist() == pytest.approx(table["class"].map(wanted).tolist())
    assert not table["clipped"].any(), "one update a rollout is on-policy"
    mean = table["logp"] - table["logp"].mean(), table["advantage"] - table["advantage"].mean()
    assert table["covariance"].tolist() == pytest.approx((mean[0] * mean[1]).tolist(), abs=1e-5)


def hostile_page(path):
    text = "</script><script>document.title='owned'</script><b>bold</b>"
    numbers = dict.fromkeys(NUMBERS, 0.5) | {"ref_logp": float("nan"), "clipped": True}
    rows = [{"uid": "q", "response": 0, "text": t, "class": c, **numbers} for t, c in ((text, "low"), ("ok", ""))]
    path.write_text(ledger_page(pd.DataFrame(rows), {("q", 0): text}, 4))


@browser
def test_the_page_colours_tokens_by_the_column_asked_for(ledger, tmp_path):
    page = ledger / "ledger" / "000002.html"
    by_class, by_entropy = (opened(page, column, tmp_path) for column in ("class", "entropy"))
    spans = re.findall(r'<span title="[^"]*" style="background-color: ([^"]*);">', by_entropy)
    assert len(spans) == len(pd.read_parquet(page.with_suffix(".parquet")))
    assert len(set(spans)) > 1
    assert len(set(re.findall(r'background-color: ([^"]*);', by_class))) == 3


@browser
def test_what_the_model_wrote_is_never_read_as_markup(tmp_path):
    hostile_page(tmp_path / "page.html")
    dom = opened(tmp_path / "page.html", "logp", tmp_path)
    assert "<title>Token ledger</title>" in dom
    assert "<b>bold</b>" not in dom
    assert "&lt;b&gt;bold&lt;/b&gt;" in dom


def test_the_page_holds_no_more_responses_than_asked(tmp_path):
    rows = [{"uid": f"q{i}", "response": 0, "text": "x", "class": "", **dict.fromkeys(NUMBERS, 0.0)} for i in range(9)]
    page = ledger_page(pd.DataFrame(rows), {(f"q{i}", 0): "?" for i in range(9)}, 4)
    assert page.count('"uid"') == 4


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js (Debian: apt-get install nodejs)")
def test_the_range_of_very_many_tokens_is_found():
    function = re.search(r"function range\(.*?\n}", PAGE.read_text(), re.DOTALL)[0]
    data = "{responses: [{tokens: [['a', '', -2], ['b', '', null], ...Array(300000).fill(['c', '', 1])]}]}"
    script = f"const data = {data}; {function} console.log(JSON.stringify(range(2)))"
    said = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(said) == [-2, 1]
