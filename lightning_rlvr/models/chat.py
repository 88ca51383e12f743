"""From the text of a question to the token ids of a prompt."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKUP = re.compile(r"<[^<>\s]+>")
STAND_IN = "QUESTIONSTANDSHERE"  # letters only: a template that strips or escapes leaves it as it is


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes a prompt.

    Args:
        chat_template: use the tokenizer's chat template (the question is the user's message); by default used
            if the tokenizer has one. Without it the question's text is the prompt as it is.
        system: the system message; needs a chat template.
        control_tokens: whether the names of control tokens that stand in a question ("<|im_end|>", "<think>") become
            these tokens, for a prompt_template that writes them; by default they are text, whoever wrote the question.
    """

    chat_template: bool | None = None
    system: str | None = None
    control_tokens: bool = False

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Return the token ids of the prompt for the question `text`.

        Raises: UserError if a chat template or system message is asked for and the tokenizer has no template.
        """
        has_template = bool(tokenizer.chat_template)
        wanted = has_template if self.chat_template is None else self.chat_template
        if wanted and not has_template:
            raise UserError(
                "chat_template is true, but this tokenizer has no chat template. Set prompt_format.chat_template "
                "to false, or take an instruction-tuned model."
            )
        # Where a question names a control token, the template is read without it, and it apart.
        apart = not self.control_tokens and any(name in text for name in control_names(tokenizer))
        reader = _reader(tokenizer) if apart else tokenizer
        if not wanted:
            if self.system is not None:
                raise UserError(
                    f"a system message ({self.system!r}) needs a chat template, and none is used. "
                    "Remove prompt_format.system, or put its text into the task's prompt_template."
                )
            return list(reader(text, split_special_tokens=not self.control_tokens)["input_ids"])
        messages = [{"role": "user", "content": STAND_IN if apart else text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        rendered = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if not apart:
            return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        first, *rest = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in rendered.split(STAND_IN)]
        question = reader(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*first, *(token for piece in rest for token in [*question, *piece])]


def control_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts that the tokenizer reads as a control token: a special one, or one that looks like markup."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or MARKUP.fullmatch(token.content)}
    return names | set(tokenizer.all_special_tokens)


def _reader(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that can read all control tokens as text; splitting leaves out those not marked special."""
    if tokenizer not in _READERS:
        added = tokenizer.added_tokens_decoder.values()
        markup = {token.content for token in added if not token.special and MARKUP.fullmatch(token.content)}
        reader = copy.deepcopy(tokenizer)
        reader.add_tokens(sorted(markup), special_tokens=True)
        _READERS[tokenizer] = reader
    return _READERS[tokenizer]


_READERS: WeakKeyDictionary[PreTrainedTokenizerBase, PreTrainedTokenizerBase] = WeakKeyDictionary()
