"""Options as dataclass fields that carry their help and their range, and the one place where they are all checked."""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["CheckedOptions", "OptionError", "Range", "choose", "kinds_of", "names_of", "option"]

T = TypeVar("T")
#: How an option's name was written where it was set: ``srpo_strength``, ``algorithm.srpo.strength``.
Named = Callable[[str], str]


class OptionError(ValueError):
    """An option is wrong. The message can be worded again with the names that the user wrote."""

    def __init__(self, sentence: str | Callable[[Named], str]) -> None:
        super().__init__(sentence if isinstance(sentence, str) else sentence(lambda name: name))
        self._sentence = sentence

    def worded(self, named: Named) -> str:
        """The message with each option under the name that `named` gives it."""
        return self._sentence if isinstance(self._sentence, str) else self._sentence(named)

    def __reduce__(self) -> tuple[Any, ...]:  # a sentence that is a function does not pickle
        return OptionError, (str(self),)


class Range(NamedTuple):
    """Bounds of a number; None is no bound."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        low = "" if self.above is self.at_least is None else f"{self.least:g}"
        high = "" if self.below is self.at_most is None else f"{self.most:g}"
        if low and high:
            return f"in {'(' if self.at_least is None else '['}{low}, {high}{')' if self.at_most is None else ']'}"
        if low:
            return f"{'above' if self.at_least is None else 'at least'} {low}"
        return f"{'below' if self.at_most is None else 'at most'} {high}" if high else ""

    @property
    def least(self) -> float:
        return self.above if self.above is not None else self.at_least if self.at_least is not None else -float("inf")

    @property
    def most(self) -> float:
        return self.below if self.below is not None else self.at_most if self.at_most is not None else float("inf")

    def holds(self, value: float) -> bool:
        """Whether the number is inside; NaN never is."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
            and value == value
        )

    def check(self, name: str, value: float) -> None:
        """Raise a ``ValueError`` that names the argument unless its value is a number inside the bounds."""
        # Named one by one: a compiled function calls this with symbolic numbers, of which little else can be asked.
        if value is None or isinstance(value, (str, bool, list, tuple, dict)):
            raise ValueError(f"{name} must be {f'a number {self}'.strip()}, got {_described(value)}")
        if not self.holds(value):
            raise ValueError(f"{name} must be {self}, got {value}")


class ReadBy(NamedTuple):
    """Which values of another option read this one."""

    option: str
    values: tuple[Any, ...]


def option(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    read_by: tuple[str, tuple[Any, ...]] | None = None,
) -> Any:
    """A dataclass field that describes itself.

    Args:
        default: Its default.
        help: What it does, in one sentence with its unit: shown by command lines and in the documentation.
        above: Exclusive lower bound of a number.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.
        read_by: The name of another option and the values of it under which this one is read. Under any other value
            this option must keep its default: setting what nobody reads is a mistake.
    """
    metadata = {
        "help": help,
        "range": Range(above, at_least, below, at_most),
        "read_by": None if read_by is None else ReadBy(*read_by),
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class CheckedOptions:
    """Base of option groups: all fields are checked on construction, each under its own name.

    A number must be a number inside its range, a name must be one of the known ones, and an option that the chosen
    map, scale or normalization does not read must be left at its default.
    """

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for each in fields(self):
            if not each.init:
                continue
            value = self._coerced(each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)
            _check(each.name, value, hints[each.name], each.metadata.get("range", Range()))
        for each in fields(self):
            if (read_by := each.metadata.get("read_by")) is not None:
                self._check_that_it_is_read(each.name, each.default, read_by)
        self._check_together()

    def _coerced(self, name: str, value: Any) -> Any:
        """What stands for the value of an option, where YAML or a command line writes it in another way."""
        return value

    def _check_together(self) -> None:
        """Raise if options that are fine one by one contradict each other."""

    def _check_that_it_is_read(self, name: str, default: Any, read_by: ReadBy) -> None:
        value, chosen = getattr(self, name), getattr(self, read_by.option)
        if value != default and chosen not in read_by.values:
            readers = " or ".join(map(repr, read_by.values))
            raise OptionError(
                lambda named: (
                    f"{named(name)} is {value!r}, but only {named(read_by.option)} {readers} reads it, and "
                    f"{named(read_by.option)} is {chosen!r}: leave {named(name)} out, or choose one that reads it"
                )
            )

    @classmethod
    def range_of(cls, name: str) -> Range:
        """The range of one of the options."""
        return next(each.metadata["range"] for each in fields(cls) if each.name == name)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The options of a mapping.

        Raises:
            OptionError: If an option is unknown, of the wrong type or out of range.
        """
        known = [each.name for each in fields(cls) if each.init]
        for name in values:
            if name not in known:
                close = get_close_matches(str(name), known, n=1)

                def sentence(named: Named, name: str = name, close: list[str] = close) -> str:
                    hint = f"did you mean {named(close[0])}? " if close else ""
                    return f"{named(name)} is unknown; {hint}The options are {', '.join(known)}"

                raise OptionError(sentence)
        return cls(**values)

    @classmethod
    def read(cls, values: Mapping[str, Any], *, named: str = "{}") -> Self:
        """Options from plain values, as YAML and command lines give them.

        Args:
            values: By the names of the options.
            named: How the user wrote an option's name, with ``{}`` where the name goes: ``"srpo_{}"``.

        Raises:
            ValueError: If an option is unknown, of the wrong type or out of range; the message names it as written.
        """
        try:
            return cls.of(values)
        except OptionError as error:
            raise ValueError(error.worded(lambda name: named.replace("{}", str(name)))) from None


# Not functools.cache: torch.compile looks through it and cannot trace `typing`, so at_step() would not compile.
_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The kinds of value that an option takes: the members of a union, or the one type that it is."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def names_of(annotation: Any) -> tuple[Any, ...]:
    """The names that an option takes; empty where it takes none."""
    return next((get_args(kind) for kind in kinds_of(annotation) if get_origin(kind) is Literal), ())


def _check(name: str, value: Any, annotation: Any, bounds: Range) -> None:
    kinds = kinds_of(annotation)
    if value is None and types.NoneType in kinds:
        return
    for kind in kinds:
        if get_origin(kind) is Literal and value in get_args(kind):
            return
        if get_origin(kind) is tuple and isinstance(value, tuple):
            return
        if get_origin(kind) is Callable:
            if callable(value):
                return
        elif kind in (int, float):
            if isinstance(value, (int, kind)) and not isinstance(value, bool):
                if not bounds.holds(value):
                    raise OptionError(lambda named: f"{named(name)} must be {str(bounds) or 'a number'}, got {value}")
                return
        elif isinstance(kind, type) and isinstance(value, kind):
            return
    expected, got = _in_words(kinds, bounds), repr(value)
    if any(kind in (int, float) for kind in kinds):
        got = _described(value)
    raise OptionError(lambda named: f"{named(name)} must be {expected}, got {got}")


def _described(value: Any) -> str:
    """What was given instead of a number, with the remedy where it is a number in quotes."""
    if isinstance(value, bool):
        return f"the boolean {value}"
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return f"the string {value!r}"
        # YAML reads 1e-3 as a string, because its numbers have a dot.
        return f"the string {value!r}; write {number!r} without quotes"
    return repr(value)


def _in_words(kinds: tuple[Any, ...], bounds: Range) -> str:
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif kind is int:
            words.append(f"a whole number {bounds}".rstrip())
        elif kind is float:
            words.append(f"a number {bounds}".rstrip())
        elif kind is types.NoneType:
            words.append("None")
        elif get_origin(kind) is Callable:
            words.append("a function")
        else:
            words.append(f"a {getattr(kind, '__name__', kind)}")
    return " or ".join(words)


def choose(argument: str, value: Any, options: Mapping[str, T]) -> T:
    """Return ``options[value]``, or raise a ``ValueError`` that names the argument and its options."""
    if value not in options:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return options[value]
