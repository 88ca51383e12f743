"""What a run says of itself at its end."""

from types import SimpleNamespace

from lightning_rlvr.training.callbacks import RunSummary


def test_where_the_outputs_are_stands_on_one_line_of_a_pipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("long name " * 10 + "[bold]")
    folder.mkdir()
    trainer = SimpleNamespace(default_root_dir=folder, global_step=0, world_size=1)
    RunSummary().on_fit_end(trainer, SimpleNamespace(clock=SimpleNamespace(seconds={}), seed=1))
    assert capsys.readouterr().out.splitlines()[-1] == f"outputs: {folder}"
