import pytest
from support import TinyPolicy

from lightning_rlvr.models.source import Policy


@pytest.mark.parametrize(("named", "ends"), [(None, [1]), (0, [0]), (7, [7]), ([0, 7], [0, 7])])
def test_the_models_own_ends_come_before_the_tokenizers(named, ends):
    model, tokenizer = TinyPolicy().load()
    model.generation_config.eos_token_id = named
    assert tokenizer.eos_token_id == 1
    assert Policy(model, tokenizer).eos_ids == ends
