"""Each mistake gives one clear error that names the key, before any work is done."""

import json
from pathlib import Path

import pytest
from support import QUICKSTART

from lightning_rlvr.__main__ import main
from lightning_rlvr.cli import free_folder
from lightning_rlvr.types import UserError


@pytest.fixture
def refused(cli, tmp_path, capsys, monkeypatch):
    """Run fit with changes that must be refused; return what it said."""
    empty_cache = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(empty_cache))

    def run(*flags: str, **changes: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            cli("fit", tmp_path / "run", **changes)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "Traceback" not in error
        assert not empty_cache.exists(), "work was done before the mistake was found"
        assert not (tmp_path / "run").exists()
        return error[error.index("error: ") :]

    return run


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__group_sise": 4}, "data.group_sise"),
        ({"model__objective__init_args__beta": 4}, "beta"),
        ({"model__objective": "lightning_rlvr.objectives.SENTT"}, "model.objective"),
        ({"data__group_size": 1}, "data.group_size"),
        ({"data__group_size": "many"}, "data.group_size"),
        ({"data__max_prompt_tokens": 5}, "data.max_prompt_tokens"),
        ({"data__max_prompt_tokens": 5, "data__long_prompts": "drop"}, "data.max_prompt_tokens"),
        ({"data__train__init_args__size": 0}, "size"),
        ({"data__train": "null"}, "data.train"),
        ({"data__curriculum__stages": 17}, "stages"),
        ({"data__curriculum__epochs": 2, "data__curriculum__adaptive": "{every: 2}"}, "data.scoring.samples"),
        ({"data__train": "support.Repeated"}, "uids"),
        ({"data__scoring__file": "nowhere.parquet", "model__reward": "support.Nameless"}, "__repr__"),
        ({"model__pass_at": "[4]"}, "data.eval_samples"),
        ({"model__sampling__temperature": 0}, "model.sampling"),
        ({"model__objective__init_args__beta_low": -1}, "model.objective.init_args.beta_low"),
        ({"model__micro_batch_size": 0}, "model.micro_batch_size"),
        ({"model__max_grad_norm": -1}, "model.max_grad_norm"),
        ({"data__seed": -1}, "data.seed"),
        ({"trainer__limit_train_batches": 2, "trainer__max_epochs": 2}, "trainer.max_steps"),
        ({"ckpt_path": Path(__file__)}, f"ckpt_path must be a checkpoint, got {__file__}"),
        ({"ckpt_path": Path(__file__).parent}, f"ckpt_path must be a checkpoint, got {Path(__file__).parent}"),
    ],
)
def test_mistakes(refused, changes, named):
    assert named in refused(**changes)


def refuse_file(tmp_path, capsys, monkeypatch, rows, named, **settings):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "questions.jsonl"
    if rows is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--data.train", "lightning_rlvr.tasks.Files", "--data.train.init_args.path", str(file)]
    settings = {"prompt_template": "{question}", **settings}
    more = [text for key, value in settings.items() for text in (f"--data.train.init_args.{key}", value)]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(QUICKSTART), "--run_dir", str(tmp_path / "run"), *task, *more])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("error: ") == 1
    assert named in error
    assert not (tmp_path / "cache").exists()


def test_a_missing_data_file(tmp_path, capsys, monkeypatch):
    refuse_file(tmp_path, capsys, monkeypatch, None, "path")


def test_an_empty_data_file(tmp_path, capsys, monkeypatch):
    refuse_file(tmp_path, capsys, monkeypatch, [], "path")


def test_a_file_without_the_named_column(tmp_path, capsys, monkeypatch):
    rows = [{"question": "1 + 1", "answer": "2"}]
    refuse_file(tmp_path, capsys, monkeypatch, rows, "answer_column", answer_column="solution")


def test_a_missing_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(tmp_path / "cache"))
    policy = ["--model.policy", "lightning_rlvr.models.Pretrained", "--model.policy.init_args.name", "./nowhere"]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(QUICKSTART), "--run_dir", str(tmp_path / "run"), *policy])
    assert exit_.value.code == 2
    assert "model.policy.init_args.name" in capsys.readouterr().err


def test_a_misspelled_key_in_a_file(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("model: {objektive: null}\n")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(config)])
    assert exit_.value.code == 2
    assert "objektive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"model: {seed: '${data.seed}'}\ndata: {seed: '${model.seed}'}\n", "model.seed"),  # a cycle
        (b"run_dir: ${nowhere.x}\n", "nowhere.x"),
        (b"run_dir: \xff\n", "utf-8"),
        (b"model: [1]\n", "model"),
    ],
)
def test_a_config_file_that_cannot_be_read(tmp_path, capsys, data, named):
    config = tmp_path / "config.yaml"
    config.write_bytes(data)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(config)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("error: ") == 1
    assert named in error
    assert "Traceback" not in error


def test_a_run_folder_that_is_a_file(tmp_path, capsys, cli):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(SystemExit, match="2"):
        cli("fit", tmp_path / "run")
    assert "run_dir" in capsys.readouterr().err


def test_a_run_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert free_folder(Path(".")) == tmp_path.with_name(f"{tmp_path.name}-2")
    with pytest.raises(UserError, match="run_dir"):
        free_folder(Path("/"))


@pytest.mark.parametrize("monitor", ["val/acuracy", "train/los"])
def test_a_metric_that_there_is_not(cli, tmp_path, capsys, monitor):
    with pytest.raises(SystemExit, match="2"):
        cli("fit", tmp_path / "run", checkpoint__monitor=monitor, checkpoint__save_top_k=2)
    error = capsys.readouterr().err
    assert f"got '{monitor}'" in error
    assert "val/avg@2" in error
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (monitor == "train/los"), "work was lost"


def test_a_run_goes_on_with_an_objective_without_a_reference(cli, tmp_path, finished_run):
    grpo = QUICKSTART.parent / "objectives" / "grpo.yaml"
    checkpoint = finished_run / "checkpoints" / "last.ckpt"
    run = cli("fit", tmp_path / "run", grpo, ckpt_path=checkpoint, trainer__max_epochs=2)
    assert json.loads((run / "summary.json").read_text())["optimizer_steps"] == 8


def test_a_checkpoint_that_does_not_fit(cli, tmp_path, finished_run, capsys):
    checkpoint = finished_run / "checkpoints" / "last.ckpt"
    cases = [
        ({"ckpt_path": tmp_path / "none.ckpt"}, "ckpt_path"),
        ({"ckpt_path": checkpoint, "model__policy__init_args__hidden_size": 64}, "model.policy"),
        ({"ckpt_path": checkpoint, "data__prompts_per_batch": 8}, "data.prompts_per_batch"),
        ({"ckpt_path": checkpoint, "model__objective": "lightning_rlvr.objectives.AdaptiveEntropy"}, "model.objective"),
    ]
    for number, (changes, named) in enumerate(cases):
        with pytest.raises(SystemExit) as exit_:
            cli("fit", tmp_path / str(number), trainer__max_epochs=2, **changes)
        assert exit_.value.code == 2
        assert named in capsys.readouterr().err
