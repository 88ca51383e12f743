"""Small models of several architectures, a batch whose prompts are shared, and gradients of both."""

import torch

from lightning_rlvr.types import Rollouts

# prompt number, tokens of the prompt, tokens of the response
ROWS = [(0, 3, 4), (0, 3, 1), (0, 3, 9), (1, 7, 2), (1, 7, 0), (2, 1, 6), (3, 5, 1), (3, 5, 8), (3, 5, 8)]
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ANGLES = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def built(name, **settings):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


def unlike_a_fresh_one(model):
    """Move biases and norms from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        return GPT2LMHeadModel(config).eval()


def batch(rows=ROWS, filler=0):
    g = torch.Generator().manual_seed(0)
    prompts = {number: torch.randint(2, 99, (length,), generator=g) for number, length, _ in rows}
    place, n, width = torch.arange(10), len(rows), max(length for _, length, _ in rows)
    ids, lengths = torch.full((n, width), filler), torch.tensor([[r] for _, _, r in rows])
    for i, (number, length, _) in enumerate(rows):
        ids[i, width - length :] = prompts[number]
    zeros = torch.zeros(n, 10)
    return Rollouts(
        prompt_ids=ids,
        prompt_mask=torch.arange(width) >= width - torch.tensor([[p] for _, p, _ in rows]),
        response_ids=torch.randint(2, 99, (n, 10), generator=g),
        mask=place < lengths,
        logp=zeros,
        entropy=zeros,
        truncated=zeros[:, 0].bool(),
    )


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(got, wanted):
    """The largest difference of two sets of gradients, relative to the largest gradient of each tensor."""
    assert got.keys() == wanted.keys()
    return max(float((got[n] - w).abs().max() / w.abs().max().clamp(min=1e-12)) for n, w in wanted.items())
