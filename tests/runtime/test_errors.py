"""How errors of a user's code are told."""

import pytest

from RL2.runtime.errors import raised


def fails(error):
    raise error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("two\n lines"), "raised ValueError: two lines (test_errors.py:9)"),
        (KeyError("a"), "raised KeyError: 'a' (test_errors.py:9)"),
        (StopIteration(), "raised StopIteration (test_errors.py:9)"),
        (ValueError("x" * 400), f"raised ValueError: {'x' * 300} (test_errors.py:9)"),
    ],
)
def test_what_is_raised_is_one_line_with_its_place(error, told):
    with pytest.raises(type(error)) as caught:
        fails(error)
    assert raised(caught.value, __file__) == told
    assert raised(caught.value, "another.py") == told.partition(" (test_errors")[0]
