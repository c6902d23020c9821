"""An evaluation of damaged weights is an error, not a bad score."""

from __future__ import annotations

import pytest

from dsv4.check.answers import tell
from dsv4.check.questions import Voice, questions
from dsv4.check.score import Row
from dsv4.check.tasks.registry import FAMILIES
from dsv4.errors import NumericsError
from dsv4.llm import LLM
from tests import PICO


def test_numbers_that_are_not_finite_end_an_evaluation() -> None:
    llm = LLM.load(PICO)
    llm.engine._runner.model.head[7] = float("nan")
    asked = questions(Row("capital", True), FAMILIES["capital"], Voice(llm.dialect, llm.tokenizer), 1, 0)
    with pytest.raises(NumericsError, match="are not finite"):
        tell(llm.engine, asked)
