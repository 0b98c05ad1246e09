"""The one exception that a user is meant to read, and the one that nobody is."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: says what is wrong, and what to do about it.

    The command line prints it as one line and exits with code 2, without a traceback.

    Args:
        problem: What is wrong, naming the field or file and its value.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        """Passes whole from process to process."""
        return type(self), (self.problem, self.remedy)


def installing(extra: str) -> str:
    """The remedy where packages are missing that not everybody needs.

    Args:
        extra: What `pyproject.toml` calls them; several with commas.
    """
    return f"`pip install -e '.[{extra}]'` in the directory of instar's source adds it."


class Elsewhere(Exception):  # noqa: N818 - the error is another process's
    """Another process of this run has failed, and says why itself."""
