import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.tasks.template import Template
from lightning_rlvr.types import UserError


@settings(max_examples=50)
@given(st.text(), st.text(), st.text())
def test_literals_and_values_come_through_unchanged(before, value, after):
    escaped = [part.replace("{", "{{").replace("}", "}}") for part in (before, after)]
    template = Template.parse(escaped[0] + "{question}" + escaped[1])
    assert template.render({"question": value}) == before + value + after


def test_names_may_hold_spaces_and_values_may_be_numbers():
    template = Template.parse("{Problem ID}: {n}{n} \\boxed{{}}")
    assert template.names == ("Problem ID", "n")
    assert template.render({"Problem ID": "a", "n": 3}) == "a: 33 \\boxed{}"


@pytest.mark.parametrize(
    "text",
    [
        "{question.__class__}",
        "{question[0]}",
        "{question!r}",
        "{question:>10}",
        "{} {question}",
        "{ } {question}",
        "\\boxed{ {question}",
        "{question}}",
        "{{question}",
        "{a{question}}",
    ],
)
def test_anything_but_a_plain_name_is_refused(text):
    with pytest.raises(UserError, match=r"plain \{names\} only.*prompt_template"):
        Template.parse(text)


@pytest.mark.parametrize("text", ["", "no name", "{{question}}"])
def test_a_template_without_a_name_is_refused(text):
    with pytest.raises(UserError, match="must name a value"):
        Template.parse(text)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(UserError, match="got 'c': available are a, b"):
        Template.parse("{a}{c}").render({"b": 1, "a": 2})
