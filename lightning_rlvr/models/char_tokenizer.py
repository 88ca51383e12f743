"""A character tokenizer: a vocabulary that a policy of a few million weights can learn in a minute."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
ALPHABET = "\n" + "".join(c for c in map(chr, range(32, 127)) if c in string.printable)


def char_tokenizer() -> PreTrainedTokenizerFast:
    r"""Build a tokenizer with one token for each printable ASCII character and the newline.

    Ids: 0 <pad>, 1 <eos>, 2 <unk>, then `ALPHABET` in order. No token is added to a text, the text "<eos>"
    is five characters and not the token, and there is no chat template. Any other character becomes <unk>.

    >>> tokenizer = char_tokenizer()
    >>> ids = tokenizer("1 + 1 =\n<eos>")["input_ids"]
    >>> len(ids), tokenizer.decode(ids)
    (13, '1 + 1 =\n<eos>')
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
