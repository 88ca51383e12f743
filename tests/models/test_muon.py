"""Muon: what torch's does, in float32."""

import pytest
import torch

from lightning_rlvr.models.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_updates_are_torchs_up_to_its_bfloat16(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - weight).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.03 * moved


def test_a_gradient_of_zero_moves_nothing_but_by_decay():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 0.95))


def test_a_matrix_without_gradient_stays():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert (weight == 1).all()


def test_directions_are_kept():
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diag(u.T @ orthogonal(matrix) @ v.T)
    torch.testing.assert_close(u @ torch.diag(values) @ v, orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3
