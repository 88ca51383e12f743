"""The embedded policy: a small language model made on the spot, so that nothing has to be downloaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_rlvr.models.cache import build_once, cache_root
from lightning_rlvr.models.char_tokenizer import char_tokenizer
from lightning_rlvr.models.source import Policy, PolicySource, finish_model
from lightning_rlvr.models.warm_start import warm_start
from lightning_rlvr.types import Teacher, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECIPE = 2  # raise it when the same settings come to give other weights
HASHED_EXAMPLES = 64
ROPE_THETA = 100.0  # prompts and solutions have tens of characters; the usual 10,000 is for thousands


@dataclass(frozen=True)
class Embedded(PolicySource):
    """A Qwen3-architecture character model, taught by supervised examples on the CPU and cached.

    The cache is a Hugging Face folder `embedded-<fingerprint>`, so any tool that reads those can use it. It
    also holds `warm_start.json` with the loss of each step.

    Args:
        teacher: where the worked solutions come from.
        hidden_size, layers, heads: size of the model; heads divides hidden_size into an even head size.
        steps, batch_size, lr: the warm start; it takes steps * batch_size examples, about 400 a second on two cores.
        seed: decides initial weights and examples. The global random state is not touched.
        cache_dir: folder of the cache; None is $LIGHTNING_RLVR_CACHE, or else ~/.cache/lightning_rlvr.
    """

    teacher: Teacher
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    steps: int = 400
    batch_size: int = 64
    lr: float = 5e-3
    seed: int = 1
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for key in ("hidden_size", "layers", "heads", "steps", "batch_size", "lr"):
            if getattr(self, key) <= 0:
                raise UserError(
                    f"{key} must be positive, got {getattr(self, key)}: it sizes the embedded policy or its "
                    f"warm start. Set model.policy.init_args.{key}."
                )
        if self.hidden_size % (2 * self.heads):
            raise UserError(
                f"hidden_size must be a multiple of 2 * heads, got {self.hidden_size} and {self.heads}: rotary "
                "positions turn pairs of values in each head. Set model.policy.init_args.hidden_size."
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the character tokenizer."""
        return char_tokenizer()

    def prepare(self) -> None:
        """Run the warm start unless it is cached.

        Raises: UserError if the cache cannot be written, or the teacher's examples end.
        """
        build_once(self.folder, self._build)

    def load(self) -> Policy:
        """Return a fresh copy from the cache, after the warm start if need be."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.prepare()
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return Policy(finish_model(model), AutoTokenizer.from_pretrained(self.folder))

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights."""
        with torch.device("meta"):
            return finish_model(self._initial(self.tokenizer()))

    def fingerprint(self) -> str:
        """Hash the settings, the teacher's settings and first examples, and the versions that matter."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("teacher", "cache_dir")}
        teacher = type(self.teacher)
        facts = {
            "recipe": RECIPE,
            "settings": settings,
            "teacher": f"{teacher.__module__}.{teacher.__qualname__}",
            "teacher_settings": _settings(self.teacher),
            "examples": list(islice(self.teacher.examples(self.seed), HASHED_EXAMPLES)),
            "versions": [version(name) for name in ("torch", "transformers")],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where the taught policy is cached."""
        return cache_root(self.cache_dir) / f"embedded-{self.fingerprint()}"

    def _build(self, folder: Path) -> None:
        tokenizer = self.tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed)
            model = self._initial(tokenizer)
            losses = warm_start(
                model,
                tokenizer,
                self.teacher.examples(self.seed),
                steps=self.steps,
                batch_size=self.batch_size,
                lr=self.lr,
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "warm_start.json").write_text(json.dumps({"loss": losses}))

    def _initial(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            use_cache=True,
        )
        return Qwen3ForCausalLM(config).float()


def _settings(teacher: Teacher) -> dict[str, Any] | None:
    return asdict(teacher) if is_dataclass(teacher) and not isinstance(teacher, type) else None
