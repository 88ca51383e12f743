"""A tiny policy, task and reward, and a cut-down quickstart: what tests of several rooms share."""

import contextlib
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml

from lightning_rlvr.models.char_tokenizer import char_tokenizer
from lightning_rlvr.models.source import Policy, PolicySource
from lightning_rlvr.types import Prompt, Response, Reward, Status, Task, Verdict

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SMALL = {
    "model.policy.init_args.hidden_size": 32,
    "model.policy.init_args.layers": 1,
    "model.policy.init_args.heads": 2,
    "model.policy.init_args.steps": 4,
    "model.sampling.max_new_tokens": 6,
    "model.pass_at": "[1, 2]",
    "data.train.init_args.size": 16,
    "data.val.init_args.size": 4,
    "data.group_size": 4,
    "data.prompts_per_batch": 4,
    "data.eval_samples": 2,
    "data.scoring.samples": 2,
    "trainer.val_check_interval": 2,
    "trainer.accelerator": "cpu",
    "checkpoint.every_n_train_steps": 1,
}


def arguments(subcommand: str, run_dir: Path, overlay: Path | None = None, **changes: object) -> list[str]:
    """The command line of a cut-down quickstart, with a config on top; `__` in a name stands for a dot."""
    on_top = [] if overlay is None else ["--config", str(overlay)]
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return [subcommand, "--config", str(QUICKSTART), *on_top, "--run_dir", str(run_dir), *flags]


def write_benchmark(path: Path, size: int, start: int = 1_000_000) -> str:
    """Write the file of a benchmark of sums; return its name."""
    sums = {"min_terms": 5, "max_terms": 5, "min_digits": 1, "max_digits": 1}
    task = {"name": "chain_sum", "size": size, "start": start, "config": sums, "prompt_template": "{expression} ="}
    settings = {
        "name": path.stem,
        "task": {"class_path": "lightning_rlvr.tasks.ReasoningGym", "init_args": task},
        "reward": {
            "class_path": "lightning_rlvr.rewards.ExactMatch",
            "init_args": {"answer_pattern": r"[#](-?\d+)$"},
        },
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["lightning_rlvr.cli"])  # imported once for all processes, which are forks


def start_warm(words: list[str], log: Path, environment: dict[str, str], script: str = "") -> ForkServerProcess:
    """Start the program, or a script, with all its modules imported; what it prints goes into the log."""
    process = _WARM.Process(target=_become, args=(words, log, environment, script))
    process.start()
    return process


def _become(words: list[str], log: Path, environment: dict[str, str], script: str) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_rlvr.__main__ import main

    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= environment
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))
    torch.set_num_threads(1)
    if script:
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
    else:
        main(words)


def _two(words: list[list[str]], environment: dict[str, str], script: str = "") -> list[tuple[int, str]]:
    """Run two processes; return what each exited with and said. Who outlives a killed one for long is killed."""
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in (0, 1)]
        ranks = [environment | {"LOCAL_RANK": str(rank)} for rank in (0, 1)]
        processes = [start_warm(*each, script) for each in zip(words, logs, ranks, strict=True)]
        try:
            multiprocessing.connection.wait([process.sentinel for process in processes], timeout=240)
            for process in processes:
                process.join(30)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def two_processes(script: str, folder: Path) -> None:
    """Run a script as two processes, each given its rank and the folder.

    Where they make a Lightning Trainer of two devices, they are its two.
    """
    ended = _two([[str(rank), str(folder)] for rank in (0, 1)], {}, script)
    assert [code for code, _ in ended] == [0, 0], "\n".join(said for _, said in ended)


def two_ranks(cache: Path, *words: str, die_at: int | None = None) -> tuple[int, str]:
    """Run the program on two ranks, this module at hand; return what the first exited with and said."""
    environment = {"LIGHTNING_RLVR_CACHE": str(cache)} | ({} if die_at is None else {"DIE_AT": str(die_at)})
    return _two([list(words)] * 2, environment)[0]


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """Let a float64 model be that throughout: the RMSNorm of transformers computes in float32, whatever it is given."""
    if model.dtype == torch.float64:
        for name, norm in list(model.named_modules()):
            if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, torch.nn.RMSNorm):
                plain = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=norm.weight.dtype)
                plain.weight = norm.weight
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, plain)
    return model


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser (Debian: apt-get install chromium)")


def opened(page: Path, choice: str, folder: Path) -> str:
    """Return the document that a browser makes of a page; `choice` is what follows # in the address."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [CHROMIUM, *quiet, f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{page}#{choice}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run `transformers serve` on the model in a folder; give the url of its API."""
    port = free_port()
    serve = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", serve, "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            for _ in range(600):
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read())
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


class TinyPolicy(PolicySource):
    """A model of a few thousand random weights that knows the characters; subclasses name other sizes."""

    family = "Qwen3"
    sizes: ClassVar = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }

    def __init__(self, seed: int = 0, dtype: str = "float32") -> None:
        self.seed, self.dtype = seed, dtype

    def tokenizer(self):
        return char_tokenizer()

    def prepare(self) -> None:
        return

    def load(self) -> Policy:
        import transformers

        tokenizer = self.tokenizer()
        config = getattr(transformers, f"{self.family}Config")(
            vocab_size=len(tokenizer),
            **self.sizes,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = getattr(transformers, f"{self.family}ForCausalLM")(config)
        return Policy(exact(model.to(getattr(torch, self.dtype)).eval()), tokenizer)

    def fingerprint(self) -> str:
        return f"tiny-{self.seed}-{self.dtype}"


class Sharp(TinyPolicy):
    """A Llama whose distributions are far from uniform; vLLM's attention wants heads of at least 32."""

    family = "Llama"
    sizes: ClassVar = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 64,
    }

    def load(self):
        policy = super().load()
        with torch.no_grad():
            policy.model.lm_head.weight.mul_(15)
        return policy


class Counting(Task):
    """Questions `0=`, `1=`, ... with the number as the answer."""

    def __init__(self, size: int = 8, start: int = 0) -> None:
        self.size, self.start = size, start

    def load(self) -> list[Prompt]:
        return [Prompt(f"count:{i}", f"{i}=", str(i)) for i in range(self.start, self.start + self.size)]


class Repeated(Counting):
    """Two questions of one name."""

    def load(self) -> list[Prompt]:
        return super().load()[:1] * 2


class ManyVowels(Reward):
    """Correct if the response holds an even number of vowels: random policies earn it now and then."""

    def __call__(self, responses: list[Response], prompts: list[Prompt]) -> list[Verdict]:
        return [self._judge(response.text) for response in responses]

    def _judge(self, text: str) -> Verdict:
        vowels = sum(text.lower().count(v) for v in "aeiou")
        good = vowels % 2 == 0
        return Verdict(float(good), Status.CORRECT if good else Status.WRONG, str(vowels))

    def __repr__(self) -> str:
        return "ManyVowels()"


class Moody(ManyVowels):
    """Judges by the global random generators of numpy and torch as well; under pytest beartype draws from python's."""

    def _judge(self, text: str) -> Verdict:
        moods = np.random.random() < 0.3, torch.rand(()).item() < 0.3
        good = (super()._judge(text).correct + sum(moods)) % 2 == 1
        return Verdict(float(good), Status.CORRECT if good else Status.WRONG, str(len(text)))

    def __repr__(self) -> str:
        return "Moody()"


class Nameless(Reward):
    """A reward that does not show its settings."""

    def __call__(self, responses: list[Response], prompts: list[Prompt]) -> list[Verdict]:
        return [Verdict(0.0, Status.WRONG)] * len(responses)


class Mortal(ManyVowels):
    """Kills its process, as kill -9 does, when asked for the DIE_AT-th time."""

    def __init__(self) -> None:
        self.left = int(os.environ.get("DIE_AT", "-1"))

    def __call__(self, responses: list[Response], prompts: list[Prompt]) -> list[Verdict]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(responses, prompts)


def train(
    tmp_path,
    objective=None,
    dtype="float64",
    updates=3,
    lr=1e-3,
    eps=1e-8,
    reward=None,
    rollouts_done=0,
    policy=None,
    strategy="auto",
    processes=1,
    **settings,
):
    """Train a tiny policy without the command line; by default with SENT, whose every term moves it."""
    from functools import partial

    import lightning

    from lightning_rlvr.curriculum import Curriculum
    from lightning_rlvr.objectives import SENT
    from lightning_rlvr.training import RLVRDataModule, RLVRModule
    from lightning_rlvr.types import Sampling

    module = RLVRModule(
        policy or TinyPolicy(dtype=dtype),
        objective or SENT(low_entropy_quantile=0.8, high_cov_fraction=0.1, beta_low=0.5, beta_high=2.0),
        reward or ManyVowels(),
        Sampling(10),
        optimizer=partial(torch.optim.AdamW, lr=lr, eps=eps),
        pass_at=[1],
        **settings,
    )
    module.rollouts_done = rollouts_done
    data = RLVRDataModule(
        train=Counting(24), prompts_per_batch=6, group_size=4, curriculum=Curriculum(order="shuffled", stages=1)
    )
    trainer = lightning.Trainer(
        max_steps=updates,
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return module, trainer


def weights(module):
    """The policy's parameters by name."""
    return dict(module.policy.named_parameters())
