"""The page of troubles is made from the tests of troubles."""

import ast

import pytest

from tests import troubles


def test_the_page_is_made_from_the_tests():
    assert troubles.PAGE.read_text(encoding="utf-8") == troubles.page(), "run python -m tests.troubles"


def test_a_test_without_a_description_is_refused():
    (test,) = ast.parse('def test_x():\n    """Nothing happens."""\n').body
    with pytest.raises(ValueError, match="test_x: its docstring has no"):
        troubles.row(test, troubles.PAGE)
