import inspect

import pytest

from arkv import ArkvError, errors
from arkv.errors import UnknownNameError


def test_every_error_is_an_arkv_error_and_a_value_error() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    classes = [c for c in classes if not issubclass(c, Warning)]
    assert len(classes) >= 7
    assert all(issubclass(c, ArkvError) and issubclass(c, ValueError) for c in classes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linar", "unknown policy 'linar'; did you mean linear?"),
        ("xyz", "unknown policy 'xyz'; known: full, linear, window"),
        ("", "unknown policy ''; known: full, linear, window"),
    ],
)
def test_near_names_are_suggested_and_all_of_them_if_none_is_near(name: str, message: str) -> None:
    assert str(UnknownNameError("policy", name, ["window", "full", "linear"])) == message
