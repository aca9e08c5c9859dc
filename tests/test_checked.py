"""Options that describe and check themselves: ranges, types, names as the user wrote them, unknown names."""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from srpo_core.checked import CheckedOptions, OptionError, Range, choose, option


@dataclass(frozen=True, kw_only=True)
class Oven(CheckedOptions):
    heat: Literal["fan", "grill"] = option("fan", "What heats.")
    degrees: float = option(180.0, "How hot.", above=0.0, at_most=250.0)
    minutes: int | None = option(None, "How long; None: until it is done.", at_least=1)
    fan_speed: float = option(1.0, "How fast the fan turns.", at_least=0.0, below=9.0, read_by=("heat", ("fan",)))
    plan: Literal["steady"] | Callable[[float], float] = option("steady", "Degrees over time.")
    label: str = option("", "What is written on it.")
    plain: float = 0.5

    def _check_together(self) -> None:
        super()._check_together()
        if self.heat == "grill" and self.degrees > 200.0:
            raise OptionError(lambda named: f"{named('degrees')} is too much for {named('heat')} 'grill'")


def double(value):
    return 2 * value


RIGHT = [
    {},
    {"degrees": 250, "minutes": 1, "fan_speed": 0},  # YAML writes whole numbers
    {"heat": "grill", "degrees": 200.0, "fan_speed": 1.0},
    {"plan": double, "label": "bread", "minutes": None},
]
WRONG = [
    ({"heat": "stove"}, "must be one of 'fan', 'grill', got 'stove'"),
    ({"heat": ["fan"]}, r"must be one of 'fan', 'grill', got \['fan'\]"),
    ({"degrees": 0.0}, r"must be in \(0, 250\], got 0.0"),
    ({"degrees": 250.1}, r"must be in \(0, 250\], got 250.1"),
    ({"degrees": math.nan}, r"must be in \(0, 250\], got nan"),
    ({"degrees": "180"}, r"must be a number in \(0, 250\], got the string '180'; write 180.0 without quotes"),
    ({"degrees": "1e-3"}, r"must be a number in \(0, 250\], got the string '1e-3'; write 0.001 without quotes"),
    ({"degrees": "hot"}, r"must be a number in \(0, 250\], got the string 'hot'$"),
    ({"degrees": True}, r"must be a number in \(0, 250\], got the boolean True"),
    ({"minutes": True}, "must be a whole number at least 1 or None, got the boolean True"),
    ({"minutes": 0}, "must be at least 1, got 0"),
    ({"minutes": 1.5}, "must be a whole number at least 1 or None, got 1.5"),
    ({"fan_speed": 9.0}, r"must be in \[0, 9\), got 9.0"),
    ({"fan_speed": None}, r"must be a number in \[0, 9\), got None"),
    ({"plan": "wild"}, "must be one of 'steady' or a function, got 'wild'"),
    ({"label": 3}, "must be a str, got 3"),
    ({"plain": math.nan}, "must be a number, got nan"),
    ({"plain": "0.5"}, "must be a number, got the string '0.5'; write 0.5 without quotes"),
]


@pytest.mark.parametrize("values", RIGHT)
def test_right_options_are_kept_as_they_are(values):
    oven = Oven(**values)
    assert {name: getattr(oven, name) for name in values} == values
    assert oven == Oven.of(values) == Oven.read(values)
    assert pickle.loads(pickle.dumps(oven)) == oven


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_options_are_named_as_they_were_written(values, message):
    (name,) = values
    with pytest.raises(OptionError, match=f"^{name} {message}"):
        Oven(**values)
    with pytest.raises(ValueError, match=f"^--oven-{name} {message}"):
        Oven.read(values, named="--oven-{}")


def test_an_option_that_nothing_reads_must_be_left_out():
    with pytest.raises(ValueError, match="^fan_speed is 2.0, but only heat 'fan' reads it, and heat is 'grill'"):
        Oven(heat="grill", fan_speed=2.0)
    with pytest.raises(ValueError, match="^o.fan_speed is 2.0, but only o.heat 'fan' reads it, and o.heat is 'grill'"):
        Oven.read({"heat": "grill", "fan_speed": 2.0}, named="o.{}")
    with pytest.raises(ValueError, match=r"^fan_speed must be in \[0, 9\)"):  # wrong comes before unread
        Oven(heat="grill", fan_speed=-2.0)


def test_options_that_contradict_each_other_are_both_named():
    with pytest.raises(ValueError, match="^o.degrees is too much for o.heat 'grill'"):
        Oven.read({"heat": "grill", "degrees": 220.0}, named="o.{}")


def test_an_unknown_option_is_named_with_what_it_may_mean():
    with pytest.raises(OptionError, match=r"^degres is unknown; did you mean degrees\? The options are heat, degrees,"):
        Oven.of({"degres": 3})
    with pytest.raises(ValueError, match=r"^o.degres is unknown; did you mean o.degrees\? The options are"):
        Oven.read({"degres": 3}, named="o.{}")
    with pytest.raises(ValueError, match="^o.xyz is unknown; The options are"):
        Oven.read({"xyz": 3}, named="o.{}")
    for name in (1, False, None):  # keys that YAML reads as something else
        with pytest.raises(ValueError, match=f"^o.{name} is unknown"):
            Oven.read({name: 3}, named="o.{}")


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        Oven("fan")


def test_option_keeps_its_description_for_command_lines_and_pages():
    degrees, fan_speed = (next(each for each in fields(Oven) if each.name == name) for name in ("degrees", "fan_speed"))
    assert degrees.default == 180.0
    assert degrees.metadata["help"] == "How hot."
    assert str(degrees.metadata["range"]) == "in (0, 250]"
    assert degrees.metadata["read_by"] is None
    assert fan_speed.metadata["read_by"] == ("heat", ("fan",))
    assert Oven.range_of("degrees") == Range(above=0.0, at_most=250.0)


@pytest.mark.parametrize(
    ("bounds", "words", "inside", "outside"),
    [
        (Range(), "", [-math.inf, 0.0, math.inf], [math.nan]),
        (Range(above=0.0), "above 0", [5e-324, math.inf], [0.0, -1.0, math.nan]),
        (Range(at_least=2.0), "at least 2", [2, 2.5], [1.9, -math.inf]),
        (Range(below=1.0), "below 1", [0.9, -math.inf], [1.0, math.inf]),
        (Range(at_most=1.0), "at most 1", [1.0], [1.0 + 1e-15, math.inf]),
        (Range(above=0.0, at_most=1.0), "in (0, 1]", [1e-9, 1.0], [0.0, 1.1, math.nan]),
        (Range(at_least=0.0, below=1.0), "in [0, 1)", [0.0, 0.9], [-1e-9, 1.0]),
        (Range(above=0.0, below=math.inf), "in (0, inf)", [1e300], [math.inf, 0.0]),
    ],
)
def test_range_of_a_number(bounds, words, inside, outside):
    assert str(bounds) == words
    assert all(map(bounds.holds, inside))
    assert not any(map(bounds.holds, outside))
    for value in inside:
        bounds.check("x", value)
    for value in outside:
        with pytest.raises(ValueError, match="^x must be "):
            bounds.check("x", value)
    for value in ("1", True, None, [1.0]):
        with pytest.raises(ValueError, match="^x must be a number"):
            bounds.check("x", value)


@pytest.mark.parametrize("sentence", ["x is wrong", lambda named: f"{named('x')} is wrong"])
def test_an_option_error_crosses_processes_with_its_message(sentence):
    """A worker's exception reaches the driver by pickle."""
    error = OptionError(sentence)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is OptionError
    assert str(copy) == str(error) == copy.worded(lambda name: f"o.{name}") == "x is wrong"


def test_choose_names_the_argument_and_its_options():
    assert choose("kind", "a", {"a": 1}) == 1
    with pytest.raises(ValueError, match="^kind must be one of 'a', 'b', got 'c'$"):
        choose("kind", "c", {"a": 1, "b": 2})
