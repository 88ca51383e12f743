"""Inputs that nobody means to give: a few of each kind that `python -m benchmarks.fuzz` tries by the thousand."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.hostile import KINDS

EXAMPLES = {"config": 3, "flag": 2}  # a config takes most of a second


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_taken_or_refused_by_one_error(kind, tmp_path):
    @settings(
        max_examples=EXAMPLES.get(kind, 20),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data):
        KINDS[kind](data.draw, tmp_path)

    one()
