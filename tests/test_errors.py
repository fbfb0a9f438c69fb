import pytest

from finetune.errors import GateRefused, Problems, UserError


def test_problems_are_told_together_in_order():
    problems = Problems()
    with problems.collect():
        raise UserError("The name is empty.", "The author is empty.")
    with problems.collect():
        pass
    problems.found.append("The disk is full.")
    with pytest.raises(UserError) as caught:
        problems.stop_if_any()
    assert caught.value.problems == ("The name is empty.", "The author is empty.", "The disk is full.")
    assert str(caught.value) == "The name is empty.\nThe author is empty.\nThe disk is full."


def test_no_problem_stops_nothing():
    Problems().stop_if_any()


def test_other_exceptions_are_bugs_and_go_through():
    with pytest.raises(KeyError), Problems().collect():
        raise KeyError("x")


def test_exit_statuses():
    assert (UserError("x").status, GateRefused("x").status) == (2, 3)
