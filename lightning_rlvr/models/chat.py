"""From the text of a question to the token ids of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes a prompt.

    Args:
        chat_template: use the tokenizer's chat template (the question is the user's message); by default used
            if the tokenizer has one. Without it the question's text is the prompt as it is.
        system: the system message; needs a chat template.
    """

    chat_template: bool | None = None
    system: str | None = None

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
        if not wanted:
            if self.system is not None:
                raise UserError(
                    f"a system message ({self.system!r}) needs a chat template, and none is used. "
                    "Remove prompt_format.system, or put its text into the task's prompt_template."
                )
            return list(tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
