"""What a decoding step attends to, said plainly: a problem with its solution row by row."""

import torch

from lightning_rlvr.rollout.decode_attention import Seen
from lightning_rlvr.rollout.shared_prefix import NEVER, Layout, SharedPrefixLayer


def problem(rows, heads, keys, width, prompts, places, limit, step, device="cpu", dtype=torch.float32):
    """The queries of a step, a layer, and what rows see; the last row sees nothing, the rest any run of columns."""
    generator = torch.Generator(device).manual_seed(rows)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    def below(most):
        return torch.randint(most, (rows + 1,), generator=generator, device=device)

    layer = SharedPrefixLayer(Layout(torch.device(device)))
    layer.prompt_keys, layer.prompt_values = (normal(prompts, keys, places, width) for _ in range(2))
    layer.own_keys, layer.own_values = (normal(rows + 1, keys, limit, width) for _ in range(2))
    seen = Seen(below(prompts), below(places), step - below(min(limit, step)), torch.tensor([step], device=device))
    seen.prompt[rows - 1], seen.start[rows - 1] = places, NEVER
    return normal(rows, heads, 1, width), layer, seen


def attended(query, layer, seen, scaling):
    """What the kernel computes [R, 1, H, D], row by row: keys and values of prompt and response side by side."""
    out, step = torch.zeros_like(query), int(seen.step)
    shared_by = query.shape[1] // layer.own_keys.shape[1]
    for row in range(len(query)):
        group, first, start = (int(of[row]) for of in seen[:3])
        columns = torch.arange(start, max(start, step + 1)) % layer.own_keys.shape[2]
        keys, values = (
            torch.cat([prompt[group, :, first:], own[row][:, columns.to(own.device)]], dim=1)
            .repeat_interleave(shared_by, dim=0)
            .to(query.dtype)
            for prompt, own in ((layer.prompt_keys, layer.own_keys), (layer.prompt_values, layer.own_values))
        )
        if keys.shape[1]:
            out[row] = (query[row] * scaling @ keys.transpose(1, 2)).softmax(dim=-1) @ values
    return out.transpose(1, 2)
