"""Tiny models of several families, and rollouts of them: what tests of decoding steps share."""

import torch

from lightning_rlvr.rollout import TransformersEngine
from lightning_rlvr.types import Sampling

PAD = 0
PROMPTS = [[40, 41, 42], [7], [5, 6, 7, 8, 9, 10, 11], [60, 3, 3, 20], [33, 2], [9] * 6]
SEEDS = [11, 22, 33, 44, 55, 66]
SAMPLING = Sampling(max_new_tokens=12)
ENDS = range(1, 12)  # about every sixth token
WINDOW = 5
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "eos_token_id": 1,
    "bos_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
SHARED = {
    "llama": GROUPED,
    "qwen2": {**SMALL, "num_key_value_heads": 1},
    "qwen3": {**GROUPED, "head_dim": 12},
    "mistral": {**GROUPED, "sliding_window": None},
    "gpt_neox": SMALL,
}
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = {
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "gemma3_text": {**GROUPED, "sliding_window": WINDOW, "head_dim": 8},
    "diffllama": GROUPED,  # its layers attend twice, to parts of the values
}
STATES = {
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**GROUPED, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "recurrent_gemma": {**SMALL, "head_dim": 8, "lru_width": 32, "block_types": ["recurrent", "attention"]},
}


def build(name, kind="shared", dtype=torch.float64, attention="sdpa", **changes):
    """A tiny model of a family with random weights, and logits that matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"shared": SHARED, "other": OTHERS, "states": STATES}[kind][name] | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    return model.to(dtype).eval()


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def generate(model, samples=3, sampling=SAMPLING, prompts=PROMPTS, seeds=SEEDS, ends=ENDS, **kwargs):
    return TransformersEngine(model, list(ends), PAD, **kwargs).generate(prompts, seeds, samples, sampling)
