from __future__ import annotations

import pytest

from mnemosyne.training.babilong.grading import contains, names_only, wilson

PLACES = frozenset({"garden", "kitchen", "office"})


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("garden", "garden", True),
        ("  Garden.", "garden", True),
        ("She is in the GARDEN now. Then the kitchen.", "garden", True),
        ("Nobody knows. Perhaps the garden.", "garden", False),
        ("", "garden", False),
        ("milk,apple", "milk,apple", True),
        ("milk, apple", "milk,apple", False),
        ("apple,milk", "milk,apple", False),
        ("I know", "no", True),  # as the benchmark has it
    ],
)
def test_the_first_sentence_contains_the_target(answer: str, target: str, right: bool) -> None:
    assert contains(answer, target) is right


def test_the_later_rule_takes_one_answer_alone() -> None:
    assert names_only("The garden.", "garden", "Where is Mary?", PLACES)
    assert not names_only("garden or kitchen", "garden", "Where is Mary?", PLACES)
    assert not names_only("kitchen", "garden", "Where is Mary?", PLACES)
    # What the question names is no answer, and so may be said.
    assert names_only("The garden is north of the Kitchen", "garden", "What is north of the kitchen?", PLACES)


def test_wilsons_interval() -> None:
    """Against published values (Wilson 1927; Newcombe 1998, table I: 81 of 263 and 15 of 148)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    # A plot's bars reach from the share to the ends, and none is negative: not by rounding either.
    for count in range(1, 300):
        assert wilson(0, count)[0] == 0 and wilson(count, count)[1] == 1
