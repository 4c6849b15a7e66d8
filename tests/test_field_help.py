"""Help texts of dataclass fields: inherited with a changed default, shown in the docstring."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest

from ensemble_rm.field_help import with_field_help


@with_field_help
@dataclass
class Base:
    """A base."""

    rate: float = field(default=0.1, metadata={"help": "learning rate", "unit": "1"})


@with_field_help
@dataclass
class Child(Base):
    """A child."""

    rate: float = 0.2
    steps: int = field(default=3, metadata={"help": "number of steps"})


def test_a_changed_default_keeps_the_help_text() -> None:
    helps = {own.name: own.metadata["help"] for own in fields(Child)}
    assert helps == {"rate": "learning rate", "steps": "number of steps"}
    assert (Child().rate, Base().rate) == (0.2, 0.1)


def test_the_docstring_lists_the_fields() -> None:
    assert Child.__doc__ == (
        "A child.\n\nAttributes\n----------\nrate : float\n    Learning rate.\n"
        "steps : int\n    Number of steps.\n"
    )


def test_a_field_without_help_is_an_error() -> None:
    @dataclass
    class Silent:
        rate: float = 0.1

    with pytest.raises(TypeError, match="'rate' of Silent has no help"):
        with_field_help(Silent)
