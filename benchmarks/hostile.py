"""Inputs that nobody means to give: configs, data files, names, prompts, answers; and what each may come to.

`KINDS` maps a kind to a function that draws one input with hypothesis and hands it to the program. An input is taken or
refused by one UserError; all else that is raised is a finding, and so is what an assertion here finds.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save

from lightning_rlvr.cli import fit_config, free_folder
from lightning_rlvr.models.char_tokenizer import char_tokenizer
from lightning_rlvr.models.chat import PromptFormat
from lightning_rlvr.rewards import ExactMatch, FormatMatch, verdicts_of
from lightning_rlvr.store import Store, read_records, user_path
from lightning_rlvr.tasks import Files
from lightning_rlvr.training.replay import load_replay
from lightning_rlvr.types import Prompt, Response, UserError

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
REFUSED, TAKEN = "refused", "taken"

SETTINGS = """
seed_everything run_dir config model model.policy model.objective model.objective.init_args.beta_low
model.reward model.reward.init_args.answer_pattern model.sampling model.sampling.temperature
model.sampling.max_new_tokens model.optimizer model.optimizer.init_args.lr model.micro_batch_size model.pass_at
model.max_grad_norm model.seed model.prompt_format model.recompute_logp data data.train
data.train.init_args.size data.train.init_args.config data.val data.group_size data.curriculum
data.curriculum.order data.curriculum.stages data.scoring.samples data.max_prompt_tokens data.seed
trainer.max_epochs trainer.devices trainer.precision trainer.accelerator checkpoint.dirpath
entropy_alarm.collapse ledger.every_n_batches save_rollouts.every_n_batches
"""

Draw = Callable[[st.SearchStrategy[Any]], Any]

# --- parts of inputs -------------------------------------------------------------------------------

HUGE = st.sampled_from([10**30, -(10**400), 1e308, float("inf"), float("-inf"), float("nan"), -0.0, 2**63, 2**31])
SYNTAX = [
    "",
    " ",
    "null",
    "~",
    "#",
    "#### 4",
    "${x}",
    "${oc.env:HOME}",
    "{",
    "{{}}",
    "{question}",
    "%s",
    "-1",
    "1e999",
    "[",
    "]",
]
PATHS = ["../../etc/passwd", "/dev/zero", "/proc/self/mem", "~nobody/x", ".", "..", "x" * 300, "\x00", "a\x00b"]
ODD = [
    "\ud800",
    "\u2028",
    "\ufeff",
    "\u202e",
    "é" * 300,
    "9" * 5000,
    "a" * 100_000,
    "\\boxed{4}",
    "<eos>",
    "!!python/name:os",
]
WORDS = st.sampled_from([*SYNTAX, *PATHS, *ODD])
TEXT = st.one_of(WORDS, st.text(max_size=40))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), HUGE, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["question", "answer", "uid", "extra", "a.b", "", "alternatives", "entry", "\x00"])


KEYS = st.sampled_from(SETTINGS.split())


def damaged(draw: Draw, data: bytes) -> bytes:
    """Cut, overwrite or lengthen some bytes."""
    for _ in range(draw(st.integers(0, 3))):
        at, junk = draw(st.integers(0, len(data))), draw(st.binary(min_size=1, max_size=8))
        how = draw(st.sampled_from(["cut", "write", "insert", "drop"]))
        tail = {"cut": b"", "write": junk + data[at + len(junk) :], "insert": junk + data[at:], "drop": data[at + 1 :]}
        data = data[:at] + tail[how]
    return data


def rows(draw: Draw) -> list[Any]:
    """Rows that are nearly questions with answers."""
    good = st.fixed_dictionaries({"question": st.text(min_size=1, max_size=9), "answer": st.integers(0, 99).map(str)})
    odd = st.dictionaries(COLUMNS, VALUES, max_size=5)
    mixed = st.builds(lambda a, b: {**a, **b}, good, odd)
    kinds = draw(st.sampled_from([good, good, mixed, st.one_of(good, mixed, odd, VALUES)]))
    chosen: list[Any] = draw(st.lists(kinds, max_size=5))
    return chosen


def encoded(draw: Draw, suffix: str) -> bytes:
    """A file of rows, as its suffix says, for the most part."""
    content = rows(draw)
    if suffix == ".parquet":
        try:
            table = pa.Table.from_pylist([row for row in content if isinstance(row, dict)])
            sink = io.BytesIO()
            pq.write_table(table, sink)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            return draw(st.binary(max_size=200))
        return sink.getvalue()
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]))
    ascii_only = draw(st.booleans())
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in content]
    text = "\n".join(texts) if suffix == ".jsonl" else f"[{', '.join(texts)}]"
    if draw(st.integers(0, 30)) == 0:
        text = "[" * draw(st.sampled_from([100, 100_000])) + text
    return text.encode(encoding, "surrogatepass" if encoding == "utf-8" else "replace")


# --- kinds -----------------------------------------------------------------------------------------


def outcome(work: Callable[[], Any]) -> str:
    """Do the work; return whether it was taken or refused. An error that a person cannot read is a finding."""
    try:
        work()
    except UserError as error:
        message = str(error)
        assert message.strip(), "the error is empty"
        assert "Traceback" not in message, "the error shows a traceback"
        return REFUSED
    return TAKEN


def load(task: Files) -> None:
    """Load a file's questions; what is taken must be texts that a tokenizer and a file can take."""
    for prompt in task.load():
        for text in (prompt.uid, prompt.text, prompt.answer):
            text.encode()
        assert prompt.uid
        assert prompt.text


def data_file(draw: Draw, folder: Path) -> str:
    """A file of questions, whole or damaged."""
    suffix = draw(st.sampled_from([".json", ".jsonl", ".parquet"]))
    path = folder / f"questions{suffix}"
    data = encoded(draw, suffix)
    path.write_bytes(damaged(draw, data) if draw(st.booleans()) else data)
    return outcome(lambda: load(Files(path=str(path))))


def columns(draw: Draw, folder: Path) -> str:
    """An intact file with settings that may not fit it."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(draw)), encoding="utf-8")
    settings: dict[str, Any] = {}
    for key in ("question_column", "answer_column", "solution_column", "uid_column"):
        if draw(st.integers(0, 2)) == 0:
            settings[key] = draw(st.one_of(COLUMNS, TEXT))
    if draw(st.booleans()):
        template = st.one_of(TEXT, st.text(alphabet="{}question.!:[]0 ", max_size=20))
        settings["prompt_template"] = draw(template)
    if draw(st.booleans()):
        pattern = st.text(alphabet="()[]{}*+?|\\.^$a1#", max_size=8)
        settings["answer_pattern"] = draw(pattern)
    if draw(st.booleans()):
        settings["rows"] = (draw(st.integers(-1, 9)), draw(st.none() | st.integers(-1, 9)))
    return outcome(lambda: load(Files(path=str(path), **settings)))


def place(draw: Draw, folder: Path) -> str:
    """A path that is no plain file, or a link to one."""
    good = folder / "good.jsonl"
    good.write_text('{"question": "1 + 1", "answer": "2"}\n')
    path = folder / "x.jsonl"
    if path.is_symlink() or path.exists():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    kind = draw(st.sampled_from(["loop", "dangling", "link", "folder", "pipe", "device", "name", "secret"]))
    if kind in ("loop", "dangling", "link", "device"):
        path.symlink_to({"loop": path, "dangling": folder / "none", "link": good, "device": "/dev/zero"}[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "secret":
        path.touch(mode=0o000)
    name = draw(TEXT) + ".jsonl" if kind == "name" else str(path)
    return outcome(lambda: load(Files(path=name)))


def prompt(draw: Draw, folder: Path) -> str:
    """A question that names control tokens: its ids must be those of text, within a template's own control tokens."""
    pieces = st.sampled_from(
        ["<eos>", "<pad>", "<unk>", "<", "eos>", "\n", "2 + 2", "[user]", "é", "\u2028", "[assistant]"]
    )
    text = draw(st.lists(pieces, min_size=1, max_size=8).map("".join))
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    ids = PromptFormat().encode(tokenizer, text)
    control = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    plain = PromptFormat().encode(tokenizer, "2")
    assert [i for i in ids if i in control] == [i for i in plain if i in control], text
    assert tokenizer.unk_token not in text or len(ids) >= len(text), text
    return TAKEN


def answer(draw: Draw, folder: Path) -> str:
    """A response or a gold answer of up to 1 MB."""
    unit = draw(
        st.sampled_from(["a", "{", "\\boxed{", "\\boxed{1}", "#### ", "####\n", "}{", " ", "9", "\n", "é", "\ud800"])
    )
    size = draw(st.sampled_from([1, 100, 20_000, 99_999, 1_000_000]))
    text = (unit * (size // len(unit) + 1))[:size] + draw(st.sampled_from(["", "\\boxed{4}", "#### 4", "#4"]))
    gold = draw(st.sampled_from(["4", text]))
    reward = draw(st.sampled_from(REWARDS))

    def judge() -> None:
        reward.check([Prompt("q", "2 + 2", gold)])
        verdict = verdicts_of(reward, [Response(text)], [Prompt("q", "2 + 2", gold)])[0]
        assert verdict.score in (0.0, 1.0)

    return outcome(judge)


def stored(draw: Draw, folder: Path) -> str:
    """A file of finished records, cut short or with damaged pages: it is read as it was written, or refused.

    Pages have checksums; the footer, with the names and types of columns, has none.
    """
    path = folder / "scores.parquet"
    path.unlink(missing_ok=True)
    records = [{"uid": str(i), "score": float(i)} for i in range(draw(st.integers(1, 4)))]
    store = Store(path, {"seed": 1})
    store.append(records)
    store.finish([record["uid"] for record in records])
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    at, junk = draw(st.integers(0, footer - 1)), draw(st.binary(min_size=1, max_size=8))
    spoilt = (data[:at] + junk)[:footer] + data[min(at + len(junk), footer) :]
    path.write_bytes(data[:at] if draw(st.booleans()) else spoilt)

    def read() -> None:
        assert read_records(path, {"seed": 1}).to_dict("records") == records, "other records than were written"

    return outcome(read)


def replay(draw: Draw, folder: Path) -> str:
    """A saved rollout batch without its policy, damaged: always refused."""
    (folder / "batch.safetensors").write_bytes(damaged(draw, save({"score": torch.zeros(3)})))
    about = json.dumps(draw(st.dictionaries(st.sampled_from(["group_size", "temperature", "x"]), VALUES, max_size=3)))
    (folder / "batch.json").write_bytes(damaged(draw, about.encode()))
    result = outcome(lambda: load_replay(folder))
    assert result == REFUSED
    return result


def run_folder(draw: Draw, folder: Path) -> str:
    """A name for the folder of a run: nothing that is there may be overwritten."""
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "file").touch()
    name = draw(
        st.one_of(TEXT, st.sampled_from(["full", "full/file", "full/file/x", "full/..", "new/../full", "x" * 300]))
    )

    def claim() -> None:
        free = free_folder(user_path(folder / name, "run_dir"))
        assert not free.exists() or not any(free.iterdir())

    return outcome(claim)


def config(draw: Draw, folder: Path) -> str:
    """A config file that is nearly the quickstart's, and words on the command line."""
    settings = yaml.safe_load(QUICKSTART.read_text())
    for _ in range(draw(st.integers(1, 2))):
        target, key = settings, draw(st.sampled_from(sorted(settings)))
        while isinstance(target[key], dict) and target[key] and draw(st.integers(0, 4)):
            target = target[key]
            key = draw(st.sampled_from(sorted(target)))
        change = draw(st.sampled_from(["value", "value", "unknown", "missing", "cycle"]))
        if change == "missing":
            del target[key]
        elif change == "cycle":
            other = draw(st.sampled_from(sorted(settings)))
            settings[other], target[key] = "${seed_everything}", f"${{{other}}}"
            settings["seed_everything"] = f"${{{other}}}"
        else:
            target[key if change == "value" else draw(TEXT)] = draw(VALUES)
    try:
        data = yaml.safe_dump(settings, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        data = json.dumps(settings).encode()
    path = folder / "config.yaml"
    path.write_bytes(damaged(draw, data) if draw(st.integers(0, 3)) == 0 else data)
    words = [] if draw(st.booleans()) else [f"--{draw(KEYS)}", draw(TEXT)]
    return outcome(lambda: fit_config(["--config", str(path), *words]))


def flag(draw: Draw, folder: Path) -> str:
    """One key of the quickstart on the command line, with a value that may not suit it."""
    value = draw(st.one_of(TEXT, VALUES.map(lambda v: json.dumps(v))))
    return outcome(lambda: fit_config(["--config", str(QUICKSTART), f"--{draw(KEYS)}", value]))


REWARDS = [
    ExactMatch(),
    ExactMatch(answer_pattern=r"[#](-?\d+)$"),
    ExactMatch(answer_pattern=r"(.+)$"),
    FormatMatch(r"<think>.*</think>\s*\\boxed\{.*\}"),
]
KINDS: dict[str, Callable[[Draw, Path], str]] = {
    kind.__name__: kind
    for kind in (data_file, columns, place, prompt, answer, stored, replay, run_folder, config, flag)
}


def _chat_tokenizer() -> Any:
    """A tokenizer with a chat template whose turns end with a control token, and that reads its name in a text."""
    tokenizer = char_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<eos>{% endfor %}[assistant]"
    )
    return tokenizer


def _reading_tokenizer() -> Any:
    """A tokenizer without a template that reads the names of control tokens in a text."""
    tokenizer = char_tokenizer()
    tokenizer.split_special_tokens = False
    return tokenizer


TOKENIZERS = {"char": char_tokenizer(), "chat": _chat_tokenizer(), "reading": _reading_tokenizer()}
