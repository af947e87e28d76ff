"""Who says what of a model: its tensors, the files beside them, the user.

{"num_attention_heads": 16} --Told--> Statement("num_heads", 16, who says it)
statements --settle--> one statement for each field; a contradiction names both sides
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sinder_jax.families import Statistics

RESAMPLING = ("interpolate_antialias", "interpolate_offset")
LARGEST = 10**9  # of any number in a config; also refuses NaN and infinity
SHOWN = 80  # characters of a strange value in a message


class Statement(NamedTuple):
    """The value that somebody gives for a field of `vit.ViTConfig`.

    Attributes:
      field: name of the field.
      value: its value.
      words: what was said and where, such as "num_attention_heads=16 in config.json".
    """

    field: str
    value: Any
    words: str


def statement(field: str, value: Any, where: str) -> Statement:
    """A statement in the words of `vit.ViTConfig`."""
    return Statement(field, value, f"{field}={value!r} in {where}")


def settle(statements: Iterable[Statement]) -> dict[str, Statement]:
    """The first statement about each field, with which all others must agree.

    How the position embedding is resampled is a choice, not a fact: the last statement
    counts.

    Raises:
      ValueError: two statements differ; quotes both.
    """
    settled: dict[str, Statement] = {}
    for one in statements:
        known = settled.setdefault(one.field, one)
        if one.field in RESAMPLING:
            settled[one.field] = one
        elif known.value != one.value:
            raise ValueError(f"{one.words} contradicts {known.words}")
    return settled


# --- JSON objects, key by key -----------------------------------------------------

Read = Callable[[Any], Any]  # value -> value; ValueError says what was expected


class Told(NamedTuple):
    """A JSON object beside the tensors; errors name the file and the key.

    Attributes:
      name: of the file, for messages.
      values: the object.
    """

    name: str
    values: Mapping[str, Any]

    def read(self, key: str, read: Read) -> Any:
        """A value that is there.

        Raises:
          ValueError: `read` refuses it.
        """
        try:
            return read(self.values[key])
        except ValueError as error:
            raise ValueError(f"{self.quote(key)}, expected {error}") from None

    def statements(self, key: str, field: str, read: Read) -> Iterator[Statement]:
        """The statement of a key about a field; none if the key is missing."""
        if key in self.values:
            words = f"{key}={self._shown(key)} in {self.name}"
            yield Statement(field, self.read(key, read), words)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuses a value that makes another function than this program computes.

        Raises:
          ValueError: the key is there, and its value is none of those allowed.
        """
        if key not in self.values or any(
            type(self.values[key]) is type(each) and self.values[key] == each
            for each in allowed
        ):
            return
        names = " or ".join(map(repr, allowed))
        raise ValueError(
            f"{self.quote(key)}, expected {names}: this program computes nothing else"
        )

    def quote(self, key: str) -> str:
        """The beginning of a message about a key."""
        return f"{self.name}: got {key}={self._shown(key)}"

    def _shown(self, key: str) -> str:
        return repr(self.values[key])[:SHOWN]


def statistics(told: Told, mean: str, std: str) -> Statement:
    """The statement of two keys about the image statistics.

    Raises:
      ValueError: one of them is missing, or holds anything but three numbers.
    """
    pair = [told.values.get(key) for key in (mean, std)]
    try:
        value = Statistics.of(pair)
    except ValueError as error:
        raise ValueError(f"{told.name}: {mean} and {std}: {error}") from None
    words = f"{mean}={pair[0]} and {std}={pair[1]} in {told.name}"
    return Statement("statistics", value, words)


def finite(value: Any) -> Any:
    """Any JSON value without NaN and infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("no NaN and no infinity") from None
    return value


def truth(value: Any) -> bool:
    """True or False."""
    if type(value) is bool:
        return value
    raise ValueError("true or false")


def integer(value: Any) -> int:
    """A number of things, at least 0."""
    if type(value) is int and 0 <= value < LARGEST:
        return value
    raise ValueError("a whole number")


def number(value: Any) -> float:
    """A finite number that is not negative."""
    if type(value) in (int, float) and 0 <= value < LARGEST:
        return float(value)
    raise ValueError("a number of at least 0")


def side(value: Any) -> int:
    """Side of a square in pixels, at least 1: one number, or the same one twice."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) == 2 and sides[0] == sides[1] and integer(sides[0]) > 0:
        return sides[0]
    raise ValueError("pixels of a square")
