import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_rlvr.models.char_tokenizer import ALPHABET, EOS, PAD, UNK, char_tokenizer

TOKENIZER = char_tokenizer()


@given(st.text(alphabet=ALPHABET))
def test_text_survives_a_round_trip(text):
    ids = TOKENIZER(text)["input_ids"]

    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", [f"{PAD}{EOS}{UNK}", " n't .", "  a\n\n b ", "1 ,2"])
def test_special_words_and_odd_spacing_are_plain_characters(text):
    ids = TOKENIZER(text)["input_ids"]

    assert TOKENIZER.decode(ids) == text
    assert not set(ids) & set(TOKENIZER.all_special_ids)


def test_a_character_outside_the_alphabet_is_unknown():
    assert TOKENIZER("é")["input_ids"] == [TOKENIZER.unk_token_id]


def test_special_tokens_are_dropped_on_request():
    ids = [TOKENIZER.pad_token_id, *TOKENIZER("7")["input_ids"], TOKENIZER.eos_token_id]

    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "7"


def test_a_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = ALPHABET + EOS

    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, len(TOKENIZER))
    assert loaded.chat_template is None
