"""Rollouts from a server that speaks OpenAI's completions API: vLLM's, `transformers serve`, and others."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_rlvr.models.pretrained import Pretrained
from lightning_rlvr.rollout.batch import as_told
from lightning_rlvr.rollout.sampling import seed_of
from lightning_rlvr.types import Engine, Rollouts, Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED_BITS = 31  # what servers take


@dataclass(frozen=True)
class Served:
    """A model that a server runs. It is sampled from, not trained.

    What it gives is the server's word: seeds are sent, but whether they draw the same responses again is up to it. No
    server tells the entropy over the whole vocabulary. vLLM's alone tells log-probabilities, those of the model, which
    are those of the distribution sampled from at temperature 1, top_p 1 and top_k 0. What is not told is nan.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        model: its name there.
        tokenizer_name: hub name or local folder of the same model, for its tokenizer; `score` takes the policy's.
        server: whose dialect is spoken. vllm takes prompts as token ids and gives ids back. transformers and openai
            (any other; what it does beside temperature and top_p is up to it) take text, which must be read as those
            ids, and the ids of a response are those of its text.
        parallel: requests at a time.
        timeout: seconds for a response.
        key_variable: environment variable that holds the server's key, where it wants one; none is sent by default.
    """

    url: str
    model: str
    tokenizer_name: str | None = None
    server: Literal["vllm", "transformers", "openai"] = "vllm"
    parallel: int = 64
    timeout: float = 600.0
    key_variable: str | None = None

    def __post_init__(self) -> None:
        if self.parallel < 1 or self.timeout <= 0:
            raise UserError(
                f"parallel must be at least 1 and timeout positive, got {self.parallel} and {self.timeout}: they are "
                "requests at a time and seconds for each. Set parallel or timeout of lightning_rlvr.rollout.Served."
            )

    def fingerprint(self) -> str:
        """Name the model, not the place where it is served."""
        return f"served {self.model!r}, tokenizer of {self.tokenizer_name!r}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises: UserError if it is not named or cannot be found."""
        if self.tokenizer_name is None:
            raise UserError(
                f"the tokenizer of a served model must be named, got none for {self.model!r}: prompts are encoded by "
                "it. Set tokenizer_name of lightning_rlvr.rollout.Served to a hub name or folder."
            )
        return Pretrained(self.tokenizer_name).tokenizer()

    def key(self) -> str:
        """Return the server's key. Raises: UserError if the variable that is to hold it is not set."""
        if self.key_variable is None:
            return "none"  # some word must be sent
        if self.key_variable not in os.environ:
            raise UserError(
                f"the server's key must be in the environment, but {self.key_variable} is not set. Set it, or "
                "key_variable of lightning_rlvr.rollout.Served to null for a server that wants none."
            )
        return os.environ[self.key_variable]


class ServedEngine(Engine):
    """Samples from a server: one request for each response, `parallel` at a time, tried again where that may help.

    Args:
        served: the server.
        tokenizer: of the model it serves.

    Raises: UserError if the package `openai` is missing.
    """

    def __init__(self, served: Served, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "sampling from a server needs the package openai, which is not installed: "
                "pip install 'lightning_rlvr[served]'."
            ) from error
        self.served, self.tokenizer, self._errors = served, tokenizer, openai.OpenAIError
        self._client = openai.OpenAI(
            base_url=served.url,
            api_key=served.key(),
            timeout=served.timeout,
            max_retries=5,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], samples: int, sampling: Sampling
    ) -> Rollouts:
        """Sample `samples` responses to each prompt: see Engine.generate, and `Served` for what the server decides.

        Raises: UserError if the server refuses a request, cannot be reached, or does not say which tokens it drew.
        """
        said = [list(prompt) if self.served.server == "vllm" else self._text(prompt) for prompt in prompts]
        asks = [
            (i, seed_of(seed, number) >> 63 - SEED_BITS) for i, seed in enumerate(seeds) for number in range(samples)
        ]
        pool = ThreadPoolExecutor(self.served.parallel)
        try:
            answers = list(pool.map(lambda ask: self._ask(said[ask[0]], ask[1], sampling), asks))
        except self._errors as error:
            raise UserError(
                f"the server at {self.served.url} must answer as {self.served.server} does, but: {error}. Set url, "
                "model or server of lightning_rlvr.rollout.Served, or start it; what was sampled before is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        return as_told(prompts, answers, sampling, self._pad_id)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _ask(self, prompt: str | list[int], seed: int, sampling: Sampling) -> tuple[list[int], list[float], bool]:
        """Return a response's tokens, their log-probabilities, and whether it was cut."""
        answer = self._client.completions.create(
            model=self.served.model,
            prompt=prompt,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            **self._extras(sampling),
        )
        choice = answer.choices[0]
        cut = choice.finish_reason == "length"
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            if self.served.server == "vllm":
                raise UserError(
                    f"the server at {self.served.url} must say which tokens it drew, as vLLM does, but did not. "
                    "Set server of lightning_rlvr.rollout.Served to transformers or openai."
                )
            ids = self.tokenizer(choice.text, add_special_tokens=False)["input_ids"]
            ids = list(ids) if cut else [*ids, self.tokenizer.eos_token_id]
        told = getattr(choice.logprobs, "token_logprobs", None)
        if sampling.temperature != 1 or sampling.top_p != 1 or sampling.top_k or not told or len(told) != len(ids):
            told = [torch.nan] * len(ids)
        return list(ids), list(told), cut

    def _extras(self, sampling: Sampling) -> dict[str, Any]:
        """Return what a server needs to sample from the model's own distribution, whatever its defaults are."""
        if self.served.server == "vllm":
            own = {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
            return {"logprobs": 0, "extra_body": {**own, "return_token_ids": True}}
        if self.served.server == "openai":
            return {}
        settings = {
            "do_sample": sampling.temperature > 0,
            "top_k": sampling.top_k,
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self._pad_id,
        }
        return {"extra_body": {"generation_config": json.dumps(settings)}}

    def _text(self, prompt: Sequence[int]) -> str:
        """Return the text that a server reads as these tokens."""
        text = str(self.tokenizer.decode(list(prompt)))
        for said in (text, text.removeprefix(str(self.tokenizer.bos_token or ""))):  # which a server may add itself
            if list(self.tokenizer(said)["input_ids"]) == list(prompt):
                return said
        raise UserError(
            f"a prompt must be the same tokens when its text is read again, but this one is not: {text!r}. Only "
            "a server that takes token ids can be asked it: set server of lightning_rlvr.rollout.Served to vllm."
        )
