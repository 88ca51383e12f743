"""Fixtures of several rooms."""

import pytest
from support import Counting, ManyVowels, TinyPolicy

from lightning_rlvr.models import PolicySource
from lightning_rlvr.types import Reward


@pytest.fixture
def tiny_policy() -> PolicySource:
    return TinyPolicy()


@pytest.fixture
def counting() -> type[Counting]:
    return Counting


@pytest.fixture
def many_vowels() -> Reward:
    return ManyVowels()
