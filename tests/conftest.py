"""Fixtures of several rooms."""

import os

import pytest
import torch
from studies import write_study
from support import Counting, ManyVowels, TinyPolicy

from lightning_rlvr.models import PolicySource
from lightning_rlvr.types import Reward

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported


@pytest.fixture
def tiny_policy() -> PolicySource:
    return TinyPolicy()


@pytest.fixture
def counting() -> type[Counting]:
    return Counting


@pytest.fixture
def many_vowels() -> Reward:
    return ManyVowels()


@pytest.fixture
def lean_however_small(monkeypatch):
    """Lets layers be lean whatever the size of their input."""
    monkeypatch.setattr("lightning_rlvr.models.lean.LEAST", 0)


@pytest.fixture
def study(tmp_path):
    """The folder of a small sweep whose numbers are known."""
    write_study(tmp_path / "study")
    return tmp_path / "study"
