"""Every option of every group: described once, checked on construction, named as written, refused where unread."""

import itertools
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, fields, replace
from functools import partial
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from srpo_core import ContextOptions, CreditOptions, LossOptions, RoleTags, SRPOConfig
from srpo_core.checked import OptionError
from srpo_core.options import AMOUNTS, CorruptionKind, GroupOptions, adapter_options, trainer_options
from srpo_core.surrogates import CISPO, GSPO, SAPO, Clip, Surrogate

GROUPS = [ContextOptions, CreditOptions, GroupOptions, LossOptions]
SURROGATES = [*Surrogate.known().values()]
GROUP_OF = {each.name: group for group in GROUPS for each in fields(group)}
OPTIONS = {each.name: each for each in fields(SRPOConfig)}
HINTS = get_type_hints(SRPOConfig)


def as_it_is(centered, scored, strength):
    return torch.exp(strength * centered)


def kinds_of(hint):
    """The members of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) not in (Literal, tuple, None) else (hint,)


def values_outside(bounds, kind):
    """The numbers just outside of each bound."""
    step = (lambda value, to: value + int(math.copysign(1, to))) if kind is int else math.nextafter
    if bounds.above is not None:
        yield bounds.above
    if bounds.at_least is not None:
        yield step(bounds.at_least, -math.inf)
    if bounds.below is not None:
        yield bounds.below
    if bounds.at_most is not None:
        yield step(bounds.at_most, math.inf)


def wrong_values(each, hint):
    kinds = kinds_of(hint)
    if NoneType not in kinds:
        yield None
    yield {"a": 1}
    for kind in kinds:
        if kind in (int, float):
            yield from values_outside(each.metadata["range"], kind)
            yield from (math.nan, True, False, "1", "typo", [1.0])
        if kind is int:
            yield 1.5
        if get_origin(kind) is Literal:
            yield from ("typo", "", 3, True)
        if get_origin(kind) is Callable:
            yield 3
        if get_origin(kind) is tuple:
            yield from ("<tag>", ("<tag>",), ("<tag>", ""), ("<a>", "</a>", "<b>"), ("<tag>", 3), 3)
        if kind is str:
            yield from ("typo", "perception = ", 3, True)
        if kind is Surrogate:
            yield from ("typo", 3, {}, {"name": "typo"}, {"name": ["clip"]}, {"high": 0.1}, {"name": "clip", "typo": 1})
            yield from ({"name": "clip", "high": -0.1}, Clip)


WRONG = [(name, value) for name in OPTIONS for value in wrong_values(OPTIONS[name], HINTS[name])]
WRONG += [("corruption_amount", -1), ("strength", math.inf)]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_every_wrong_option_is_named(name, value):
    """On construction, whatever else is chosen, in its own group and in the whole; as it was written, if read."""
    for options in (GROUP_OF[name], SRPOConfig):
        with pytest.raises(OptionError, match=rf"^{name}\b"):
            options(**{name: value})
        with pytest.raises(OptionError, match=rf"^{name}\b"):
            replace(options(), **{name: value})
        with pytest.raises(ValueError, match=rf"^actor\.srpo_{name}\b"):
            options.read({name: value}, named="actor.srpo_{}")


@pytest.mark.parametrize("cls", SURROGATES)
def test_every_wrong_parameter_of_a_surrogate_is_named(cls):
    hints = get_type_hints(cls)
    for each in fields(cls):
        if not each.init:
            continue
        for value in wrong_values(each, hints[each.name]):
            with pytest.raises(ValueError, match=rf"^{each.name} must be "):
                cls(**{each.name: value})
            with pytest.raises(ValueError, match=rf"^surrogate\.{each.name} must be "):
                LossOptions(surrogate={"name": cls.name, each.name: value})
            with pytest.raises(ValueError, match=rf"^loss\.surrogate\.{each.name} must be "):
                SRPOConfig.read({"surrogate": {"name": cls.name, each.name: value}}, named="loss.{}")


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (partial(CISPO, max_ratio=-1), "max_ratio must be above 0, got -1"),
        (partial(CISPO, min_ratio=6), "min_ratio must be at most max_ratio 5.0, got 6"),
        (partial(SAPO, temperature_negative=-3), "temperature_negative must be above 0, got -3"),
        (partial(SAPO, temperature_positive=0.0), "temperature_positive must be above 0, got 0.0"),
        (partial(Clip, low=1.0), r"low must be in \[0, 1\), got 1.0"),
        (partial(Clip, high=-0.1), "high must be at least 0, got -0.1"),
        (partial(Clip, dual=1.0), "dual must be above 1, got 1.0"),
        (partial(CreditOptions, scale_decay=7), r"scale_decay must be in \[0, 1\), got 7"),
        (partial(ContextOptions, corruption_amount=-1), r"corruption_amount of kind 'patch_mask' must be in \(0, 1\]"),
        (partial(ContextOptions, corruption_amount=math.nan), "corruption_amount must be a number, got nan"),
    ],
)
def test_what_once_passed_for_right(surrogate, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        surrogate()


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_at_inclusive_bounds_are_right(name):
    bounds = OPTIONS[name].metadata["range"]
    for value in (bounds.at_least, bounds.at_most):
        if value is not None:
            value = int(value) if int in kinds_of(HINTS[name]) else value
            for number in {value, int(value)}:  # YAML writes `kl_coef: 0`
                needed = {"scale": "ema_rms"} if name == "scale_decay" else {}
                assert getattr(SRPOConfig(**needed, **{name: number}), name) == number


# What is read by nothing


def names_of(option):
    return next(get_args(kind) for kind in kinds_of(HINTS[option]) if get_origin(kind) is Literal)


READ = {name: each.metadata["read_by"] for name, each in OPTIONS.items() if each.metadata["read_by"] is not None}


def test_what_is_read_by_some_choices_only():
    named = {name: read_by.option for name, read_by in READ.items()}
    assert named.items() >= {"bound": "weight_map", "scale_decay": "scale", "epsilon": "normalization"}.items()
    for read_by in READ.values():
        assert set(read_by.values) < set(names_of(read_by.option))


@pytest.mark.parametrize("name", READ)
def test_an_option_that_the_choice_does_not_read_is_refused(name):
    chooser, readers = READ[name]
    for options in (GROUP_OF[name], SRPOConfig):
        for choice in readers:
            assert getattr(options(**{chooser: choice, name: 0.25}), name) == 0.25
        others = [choice for choice in names_of(chooser) if choice not in readers]
        for choice in [*others, as_it_is] if chooser == "weight_map" else others:
            with pytest.raises(ValueError, match=rf"^{name} is 0.25, but only {chooser} .* reads it"):
                options(**{chooser: choice, name: 0.25})
            with pytest.raises(ValueError, match=rf"^x\.{name} is 0.25, but only x\.{chooser} .* reads it"):
                options.read({chooser: choice, name: 0.25}, named="x.{}")
            options(**{chooser: choice, name: OPTIONS[name].default})


# What goes together or not


@pytest.mark.parametrize("kind", get_args(CorruptionKind))
def test_an_amount_belongs_to_its_kind_of_corruption(kind):
    assert ContextOptions(corruption=kind).corruption_amount is None
    if kind not in AMOUNTS:
        with pytest.raises(ValueError, match=f"^corruption_amount has no meaning for kind '{kind}'"):
            ContextOptions(corruption=kind, corruption_amount=0.5)
        return
    default, bounds, whole = AMOUNTS[kind]
    assert ContextOptions(corruption=kind, corruption_amount=default).corruption_amount == default
    wrong = [*values_outside(bounds, float), math.nan] + [2.5] * whole
    for amount in wrong:
        with pytest.raises(ValueError, match="^x.corruption_amount "):
            ContextOptions.read({"corruption": kind, "corruption_amount": amount}, named="x.{}")


def test_strength_and_bound_keep_weights_within_float32():
    CreditOptions(strength=40.0, bound=1.0)
    with pytest.raises(ValueError, match=r"^strength must be in \[0, 40 / bound\], got 41.0 with bound 1.0"):
        CreditOptions(strength=41.0, bound=1.0)
    with pytest.raises(ValueError, match=r"^x.strength must be in \[0, 40 / x.bound\], got 1.0 with x.bound 50.0"):
        SRPOConfig.read({"strength": 1.0, "bound": 50.0}, named="x.{}")


def test_tags_of_yaml_and_no_answer_tags():
    options = ContextOptions(perception_tags=["<p>", "</p>"], reasoning_tags=["<t>", "</t>"], answer_tags=["<a>", "b"])
    assert options.tags == RoleTags(("<p>", "</p>"), ("<t>", "</t>"), ("<a>", "b"))
    assert hash(options) == hash(replace(options))
    for nothing in (None, "", [], ()):
        assert ContextOptions(answer_tags=nothing).answer_tags is None
    assert ContextOptions().tags == RoleTags()


def test_response_format_is_a_name_or_the_lines_of_a_grammar():
    assert ContextOptions().response_format == ""
    assert ContextOptions(response_format="vision-sr1").tags == RoleTags(
        ("<description>", "</description>"), ("<think>", "</think>"), ("\\boxed{", "}")
    )
    assert ContextOptions(response_format=" Headings\n").tags.perception == ("### Perception", "")
    lines = "perception in reasoning = <p> ... </p>\nreasoning = <t> ... </t>\n"
    assert SRPOConfig(response_format=lines).tags == RoleTags(("<p>", "</p>"), ("<t>", "</t>"), None, nested=True)
    assert ContextOptions(perception_tags="### See", answer_tags=["Answer:"]).tags == RoleTags(
        "### See", answer="Answer:"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"response_format": "vison-sr1"}, "^x.response_format must be one of 'default', .*did you mean 'vision-sr1'"),
        ({"response_format": "<p>"}, "^x.response_format must be one of 'default', .*, or lines such as 'perception ="),
        ({"response_format": "perception = <p>"}, "^x.response_format is not a format: line 1 of the format, 'perc"),
        (
            {"response_format": "default", "answer_tags": None},
            "^x.response_format says what all tags are, and x.answer_tags is None as well: leave one of them out$",
        ),
        (
            {"response_format": "nested", "perception_tags": ["<p>", "</p>"]},
            "^x.response_format says what all tags are, and x.perception_tags is .'<p>', '</p>'. as well",
        ),
    ],
)
def test_response_format_is_refused_in_a_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        SRPOConfig.read(values, named="x.{}")
    with pytest.raises(OptionError, match=message.replace("x.", "")):
        ContextOptions(**values)


def test_tags_that_mean_two_things_are_named_together():
    with pytest.raises(ValueError, match="^perception_tags, reasoning_tags, answer_tags: .*'<think>' more than once"):
        ContextOptions(perception_tags=("<think>", "</p>"))
    with pytest.raises(ValueError, match=r"^x.perception_tags, x.reasoning_tags, x.answer_tags: each tag must mean"):
        SRPOConfig.read({"answer_tags": ("<think>", "</a>")}, named="x.{}")


def test_one_ratio_for_a_sequence_is_refused_where_weights_would_do_nothing():
    for nothing in ({"strength": 0.0}, {"mix": 0.0}):
        assert SRPOConfig(surrogate="gspo", **nothing).surrogate == GSPO()
    assert LossOptions(surrogate="gspo").surrogate == GSPO()  # by itself it knows of no weights
    with pytest.raises(ValueError, match=r"^surrogate='gspo' with strength=1.0: GSPO's sequence-level .*gspo_token"):
        SRPOConfig(surrogate="gspo")
    with pytest.raises(ValueError, match=r"^x.surrogate='gspo' with x.strength=0.5: "):
        SRPOConfig.read({"surrogate": "gspo", "strength": 0.5}, named="x.{}")


# Surrogates


def test_a_surrogate_may_be_an_object_a_name_or_a_mapping():
    assert LossOptions().surrogate == Clip()
    for cls in SURROGATES:
        assert LossOptions(surrogate=cls.name).surrogate == cls()
        assert LossOptions(surrogate={"name": cls.name}).surrogate == cls()
    clip = Clip(low=0.1, high=0.28, dual=3.0)
    assert LossOptions(surrogate={"name": "clip", "low": 0.1, "high": 0.28, "dual": 3}).surrogate == clip
    assert LossOptions(surrogate=clip).surrogate is clip
    assert SRPOConfig.read({"surrogate": {"name": "sapo", "temperature_negative": 2.0}}).surrogate.name == "sapo"
    given = {"name": "clip", "low": 0.1}
    LossOptions(surrogate=given)
    assert given == {"name": "clip", "low": 0.1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cipso", "surrogate must be one of 'clip', 'cispo', .* got 'cipso'"),
        ({"name": "cipso"}, "surrogate must be one of 'clip', 'cispo', .* got {'name': 'cipso'}"),
        ({"low": 0.1}, "surrogate must be one of 'clip', .*, a mapping with such a 'name', or a Surrogate, got"),
        ({"name": "clip", "hihg": 0.1}, r"surrogate.hihg is unknown; did you mean surrogate.high\?"),
        ({"name": "cispo", "high": 0.1}, r"surrogate.high is unknown; The options are max_ratio, min_ratio$"),
    ],
)
def test_an_unknown_surrogate_or_parameter_is_named(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LossOptions(surrogate=value)
    written = message.replace("surrogate ", "x.surrogate ").replace("surrogate.", "x.surrogate.")
    with pytest.raises(ValueError, match=f"^{written}"):
        SRPOConfig.read({"surrogate": value}, named="x.{}")


def test_bounds_that_exclude_each_other_are_named_as_written():
    with pytest.raises(ValueError, match=r"^x.surrogate.min_ratio must be at most x.surrogate.max_ratio 2, got 3$"):
        SRPOConfig.read({"surrogate": {"name": "cispo", "max_ratio": 2, "min_ratio": 3}}, named="x.{}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, False), ({"surrogate": "gspo_token"}, True), ({"surrogate": "vespo"}, True), ({"kl_coef": 0.1}, False),
     ({"off_policy_threshold": 0.0}, True)],
)  # fmt: skip
def test_a_loss_is_of_the_sequence_level_where_tokens_of_a_response_depend_on_each_other(options, expected):
    assert LossOptions(**options).is_sequence_level is expected


# The groups and the whole

CHANGED = {
    ContextOptions: {
        "perception_tags": ("<see>", "</see>"),
        "answer_tags": None,
        "answer_role": "other",
        "corruption": "blur",
        "corruption_amount": 4.0,
        "reliance_spans": 3,
    },
    CreditOptions: {"strength": 0.5, "weight_map": as_it_is, "scale": "ema_rms", "scale_decay": 0.9, "mix": 0.25},
    GroupOptions: {"epsilon": 0.0},
    LossOptions: {"surrogate": Clip(dual=3.0), "kl_coef": 0.1, "kl_estimator": "k2", "reduction": "sum"},
}
CHANGED[SRPOConfig] = {name: value for group in GROUPS for name, value in CHANGED[group].items()}


@pytest.mark.parametrize("cls", CHANGED)
def test_options_survive_pickle_replace_and_asdict(cls):
    for options in (cls(), cls(**CHANGED[cls])):
        assert pickle.loads(pickle.dumps(options)) == options
        assert replace(options) == options
        assert cls(**asdict(options)) == options
        assert cls.read(asdict(options)) == options
        assert hash(replace(options)) == hash(options)
    assert cls() != cls(**CHANGED[cls])
    for name, value in CHANGED[cls].items():
        assert getattr(cls(**CHANGED[cls]), name) == value


@pytest.mark.parametrize("cls", SURROGATES)
def test_surrogates_survive_pickle_replace_and_asdict(cls):
    surrogate = cls(**{each.name: 0.5 for each in fields(cls) if each.init and each.name != "dual"})
    assert pickle.loads(pickle.dumps(surrogate)) == replace(surrogate) == surrogate != cls()
    assert asdict(surrogate)["name"] == cls.name
    options = LossOptions(surrogate=surrogate)
    assert LossOptions(**asdict(options)) == pickle.loads(pickle.dumps(options)) == options
    assert eval(repr(surrogate), {cls.__name__: cls}) == surrogate  # no name in it


def test_options_are_frozen_and_keywords_only():
    with pytest.raises(FrozenInstanceError):
        SRPOConfig().strength = 2.0
    with pytest.raises(TypeError):
        SRPOConfig(1.0)


def test_srpo_config_is_each_of_the_groups_and_has_their_options_once():
    names = [each.name for group in GROUPS for each in fields(group)]
    assert len(names) == len(set(names))
    assert set(names) == set(OPTIONS)
    for group in GROUPS:
        assert isinstance(SRPOConfig(), group)
        for each in fields(group):
            assert getattr(SRPOConfig(), each.name) == getattr(group(), each.name) == each.default


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_says_in_a_sentence_what_it_does(name):
    text = OPTIONS[name].metadata["help"]
    assert re.fullmatch(r"[A-Z`].*\.", text), text


def test_adapter_options_and_trainer_options_share_out_all_of_them():
    assert adapter_options().keys() | trainer_options().keys() == OPTIONS.keys()
    assert not adapter_options().keys() & trainer_options().keys()
    assert {"strength", "corruption"} <= adapter_options().keys()
    assert {"epsilon", "surrogate"} <= trainer_options().keys()
    for name, each in (adapter_options() | trainer_options()).items():
        assert each.name == name
        assert each.default == OPTIONS[name].default


# What options say of themselves


def test_at_step_ramps_the_mixture_and_refuses_negative_steps():
    options = CreditOptions(mix=0.5, mix_warmup_steps=2)
    assert [options.at_step(step).mix for step in range(4)] == [0.0, 0.25, 0.5, 0.5]
    assert CreditOptions().at_step(0).mix == 1.0
    whole = SRPOConfig(mix_warmup_steps=4, kl_coef=0.5)
    assert whole.at_step(1) == replace(whole, mix=0.25)
    assert whole.at_step(4) is whole
    with pytest.raises(ValueError, match="^step must be at least 0, got -1"):
        options.at_step(-1)


@pytest.mark.parametrize(("strength", "mix", "spans"), [*itertools.product([0.0, 1.0], [0.0, 1.0], [0, 3])])
def test_reliance_takes_passes_where_weights_can_differ(strength, mix, spans):
    options = SRPOConfig(strength=strength, mix=mix, reliance_spans=spans)
    assert options.changes_nothing == (strength == 0.0 or mix == 0.0)
    assert options.reliance_passes == (spans if strength and mix else 0)
