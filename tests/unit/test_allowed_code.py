"""A user's own code: allowed by the command line only. Run: pytest tests/unit/test_allowed_code.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from selectmoe import allowed_code
from selectmoe.errors import UserError


def test_only_what_was_allowed_is_given_and_a_later_call_forgets_the_earlier() -> None:
    with pytest.raises(UserError, match=r"add allow_code=\[math:sqrt\]"):
        allowed_code.get("math:sqrt", "x")
    allowed_code.allow(["math:sqrt"])
    assert allowed_code.get("math:sqrt", "x")(9.0) == 3.0
    allowed_code.allow([])
    with pytest.raises(UserError, match="x=math:sqrt names code"):
        allowed_code.get("math:sqrt", "x")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("math.sqrt", "not of the form package.module:callable"),
        ("../evil:run", "not of the form package.module:callable"),
        ("math:sqrt()", "not of the form package.module:callable"),
        ("no_such_module_here:f", "cannot be imported.*ModuleNotFoundError"),
        ("math:no_such", "cannot be imported.*AttributeError"),
        ("math:pi", "is a float, not a callable"),
    ],
)
def test_what_cannot_be_called_is_refused_in_one_line(path: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        allowed_code.allow([path])
    assert "\n" not in str(caught.value)


def test_a_module_that_raises_while_imported_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_expert.py").write_text("raise RuntimeError('no GPU')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="RuntimeError: no GPU"):
        allowed_code.allow(["broken_expert:f"])
