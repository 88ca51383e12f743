import math

import pytest

from lightning_rlvr.objectives import Clipped, ClippedWeight, SequenceClipped
from lightning_rlvr.types import UserError


@pytest.mark.parametrize("surrogate", [Clipped, SequenceClipped, ClippedWeight])
@pytest.mark.parametrize(
    ("key", "value"), [("low", 0.0), ("low", 1.5), ("low", math.nan), ("high", 0.0), ("high", -0.1)]
)
def test_bad_bounds_are_refused_by_the_name_of_the_key(surrogate, key, value):
    with pytest.raises(UserError, match=rf"model\.objective\.init_args\.surrogate\.init_args\.{key}\."):
        surrogate(**{key: value})
