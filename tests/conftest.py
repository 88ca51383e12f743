"""A tiny policy and what else the tests of the stages share."""

import pytest
import torch

from lightning_rlvr.models.char_tokenizer import char_tokenizer
from lightning_rlvr.models.source import Policy, PolicySource
from lightning_rlvr.types import Prompt, Response, Reward, Status, Task, Verdict


class TinyPolicy(PolicySource):
    """A Qwen3 of a few thousand random weights that knows the characters."""

    def __init__(self, seed: int = 0, dtype: str = "float32") -> None:
        self.seed, self.dtype = seed, dtype

    def tokenizer(self):
        return char_tokenizer()

    def load(self) -> Policy:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        tokenizer = self.tokenizer()
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = Qwen3ForCausalLM(config)
        return Policy(model.to(getattr(torch, self.dtype)).eval(), tokenizer)

    def fingerprint(self) -> str:
        return f"tiny-{self.seed}-{self.dtype}"


class Counting(Task):
    """Questions `0=`, `1=`, ... with the number as the answer."""

    def __init__(self, size: int = 8, start: int = 0) -> None:
        self.size, self.start = size, start

    def load(self) -> list[Prompt]:
        return [Prompt(f"count:{i}", f"{i}=", str(i)) for i in range(self.start, self.start + self.size)]


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


@pytest.fixture
def tiny_policy() -> PolicySource:
    return TinyPolicy()


@pytest.fixture
def counting() -> type[Counting]:
    return Counting


@pytest.fixture
def many_vowels() -> Reward:
    return ManyVowels()
