"""Figures of one run."""

import pandas as pd
import pytest

from lightning_rlvr.analysis.pictures import step_sizes
from lightning_rlvr.types import UserError


def tables(**first_order):
    columns = ["entropy_change/measured", "entropy_change/first_order"]
    return {
        eta: pd.DataFrame([[0.9 * eta * c, eta * c] for c in first_order.values()], list(first_order), columns)
        for eta in (0.01, 0.1)
    }


def test_an_objective_without_gradient_is_left_out_of_the_step_sizes():
    (axes,) = step_sizes(tables(grpo=-1.0, still=0.0)).axes
    drawn = [list(line.get_ydata()) for line in axes.get_lines()]
    assert drawn == [pytest.approx([0.9, 0.9]), [1, 1]]


def test_a_batch_on_which_nothing_has_a_gradient():
    with pytest.raises(UserError, match="groups whose rewards differ"):
        step_sizes(tables(grpo=0.0))
