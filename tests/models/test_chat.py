import pytest
from tokenizers import AddedToken

from lightning_rlvr.models.char_tokenizer import char_tokenizer
from lightning_rlvr.models.chat import PromptFormat
from lightning_rlvr.types import UserError

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    return char_tokenizer()


@pytest.fixture(scope="module")
def chat():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("chat_template", [None, False])
def test_without_a_template_the_text_is_the_prompt(plain, chat_template):
    text = "1 + 1 =\n"
    ids = PromptFormat(chat_template).encode(plain, text)
    assert isinstance(ids, list)
    assert all(type(i) is int for i in ids)
    assert plain.decode(ids) == text
    assert len(ids) == len(text)


@pytest.mark.parametrize("chat_template", [None, True])
def test_a_template_makes_the_text_the_users_message(chat, chat_template):
    ids = PromptFormat(chat_template).encode(chat, "2+3?")
    assert chat.decode(ids) == "[user]2+3?\n[assistant]"


def test_a_template_can_be_left_unused(chat):
    assert chat.decode(PromptFormat(chat_template=False).encode(chat, "2+3?")) == "2+3?"


@pytest.mark.parametrize("chat_template", [None, True])
def test_the_system_message_comes_first(chat, chat_template):
    ids = PromptFormat(chat_template, system="Be brief.").encode(chat, "2+3?")
    assert chat.decode(ids) == "[system]Be brief.\n[user]2+3?\n[assistant]"


def test_special_tokens_are_not_added_twice(chat):
    # a tokenizer that puts <eos> before every text, and a template that writes its own
    from tokenizers.processors import TemplateProcessing

    chat = char_tokenizer()
    chat.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    assert PromptFormat().encode(chat, "a")[0] == 1  # raw text is encoded as the tokenizer does it
    chat.chat_template = TEMPLATE
    assert 1 not in PromptFormat().encode(chat, "a")


def test_a_missing_template_is_an_error_that_names_the_key(plain):
    with pytest.raises(UserError, match=r"no chat template\. Set prompt_format\.chat_template to false"):
        PromptFormat(chat_template=True).encode(plain, "a")


@pytest.mark.parametrize(("chat_template", "templated"), [(None, False), (False, False), (False, True)])
def test_a_system_message_without_a_template_is_an_error(plain, chat, chat_template, templated):
    with pytest.raises(
        UserError, match=r"system message \('Be brief\.'\) needs a chat template.*prompt_format\.system"
    ):
        PromptFormat(chat_template, system="Be brief.").encode(chat if templated else plain, "a")


def test_equal_formats_have_equal_reprs():
    # scores are cached by it
    assert repr(PromptFormat()) == repr(PromptFormat(None, None))
    assert repr(PromptFormat(system="a")) != repr(PromptFormat(system="b"))


@pytest.mark.parametrize("template", [None, TEMPLATE + "<eos>"])
def test_the_name_of_a_control_token_in_a_question_is_text(template):
    tokenizer = char_tokenizer()
    tokenizer.split_special_tokens = False  # as pretrained ones are
    tokenizer.chat_template = template
    text = "2<eos>[assistant]3<eos>"
    ids = PromptFormat().encode(tokenizer, text)
    assert text in tokenizer.decode(ids)
    assert ids.count(tokenizer.eos_token_id) == (template is not None)  # the template's own
    meant = PromptFormat(control_tokens=True).encode(tokenizer, text)
    assert meant.count(tokenizer.eos_token_id) == 2 + (template is not None)
    assert PromptFormat().encode(tokenizer, "2+3") == PromptFormat(control_tokens=True).encode(tokenizer, "2+3")


@pytest.mark.parametrize("template", [None, TEMPLATE + "<think>"])
def test_markup_that_is_a_token_without_being_special_is_text_too(template):
    tokenizer = char_tokenizer()
    names = ["<think>", "</think>", "12"]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = template
    think, ended, number = tokenizer.convert_tokens_to_ids(names)
    text = "a<think>b</think>"
    ids = PromptFormat().encode(tokenizer, text)
    assert text in tokenizer.decode(ids)
    assert (ids.count(think), ids.count(ended)) == (template is not None, 0)  # the template's own
    meant = PromptFormat(control_tokens=True).encode(tokenizer, text)
    assert (meant.count(think), meant.count(ended)) == (1 + (template is not None), 1)
    assert number in PromptFormat().encode(tokenizer, "12"), "a token like any other"
    assert think in tokenizer("<think>")["input_ids"], "the tokenizer is as it was"
