"""The one exception that is shown without a traceback."""

import contextlib
import re
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can mend: what is wrong, with which value, and what to do.

    Several problems found together are raised together, one sentence or two each.
    """

    status = 2  # the process's exit status, see design: 0 done, 1 a bug, 2 the user can mend it, 3 the gate refused

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def without_user(text: str) -> str:
    """Without the users and passwords of the URLs in it."""
    return re.sub(r"(?<=://)[^/\s]+@", "", text)


class GateRefused(UserError):
    """The scorecard's gate refused the run."""

    status = 3


class Problems:
    """Collects problems so that all are told at once: `with problems.collect(): ...`, then `problems.stop_if_any()`."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.found += error.problems

    def stop_if_any(self) -> None:
        if self.found:
            raise UserError(*self.found)
