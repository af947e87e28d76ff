"""One input of `mutations`, and how a run on it is judged."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Trial(NamedTuple):
    """One input, and how a run on it is judged.

    Attributes:
      what: the mutation, in words.
      arguments: of the program's `main`; `OUT` stands for a path where nothing is.
      input: the mutated file; None if there is none.
      judge: called with that path after exit code 0; "right" if the result is that of
        the input before the mutation, "as stored" if the input is valid and means
        something else now, "wrong" otherwise.
    """

    what: str
    arguments: list[str]
    input: Path | None
    judge: Callable[[Path], str]
