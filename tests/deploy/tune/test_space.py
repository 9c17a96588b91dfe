"""KEY=SPACE arguments, and the settings that are drawn from them."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections import Counter

import numpy as np
import pytest

from common.config.overrides import toml_text
from common.errors import UserError
from deploy.tune.space import Choices, Range, draw, parse_space


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("a=0.05,0.1,0.2", Choices("a", (0.05, 0.1, 0.2))),
        ("a=1,length", Choices("a", (1, "length"))),
        ("a=clip,mask", Choices("a", ("clip", "mask"))),
        ("a=true,false", Choices("a", (True, False))),
        ('a="x,y",z', Choices("a", ('"x', 'y"', "z"))),  # half a TOML list: bare words
        ('a="x,y","z"', Choices("a", ("x,y", "z"))),
        ("a=[0.9, 0.95],[0.9, 0.99]", Choices("a", ([0.9, 0.95], [0.9, 0.99]))),
        ("a={rank = 8},{rank = 16}", Choices("a", ({"rank": 8}, {"rank": 16}))),
        ("a=7", Choices("a", (7,))),
        ("a=../x.jsonl", Choices("a", ("../x.jsonl",))),
        ("a=x..2,log:file", Choices("a", ("x..2", "log:file"))),
        ("a=1..4", Range("a", 1, 4, log=False, whole=True)),
        ("a=0.0..0.1", Range("a", 0, 0.1, log=False, whole=False)),
        ("a=log:1e-6..1e-4", Range("a", 1e-6, 1e-4, log=True, whole=False)),
        ("a=log:1..100", Range("a", 1, 100, log=True, whole=True)),
        ("a=-2..-1.5", Range("a", -2, -1.5, log=False, whole=False)),
    ],
)
def test_an_argument_is_read(text, space):
    assert parse_space(text) == space


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "must read KEY=SPACE"),
        ("=1,2", "must read KEY=SPACE"),
        ("a=", "must read KEY=SPACE"),
        ("a=2..1", "the first number of a range must be below the second"),
        ("a=1..1", "the first number of a range must be below the second"),
        ("a=log:0..1", "must begin above 0"),
        ("a=1..x", "a range is two numbers"),
        ("a=0.1,0.2..0.3", "a range is two numbers"),
        ("a=log:3", "a range is two numbers"),
        ("a=1..1e999", "the first number of a range must be below the second"),
        ("a=1,,2", "a value between two commas is missing"),
        ("a=1,2,1", "names a value twice"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_space(text)


@pytest.mark.parametrize("seed", range(3))
def test_each_part_of_a_range_is_drawn_once(seed):
    spaces = [parse_space("a=log:1e-6..1e-2"), parse_space("b=-1.0..1.0")]
    drawn = draw(spaces, 16, seed=seed)
    parts = [sorted(int((math.log10(one["a"]) + 6) / 4 * 16) for one in drawn), []]
    parts[1] = sorted(int((one["b"] + 1) / 2 * 16) for one in drawn)
    assert parts == [list(range(16))] * 2


@pytest.mark.parametrize(
    "text", ["a=0.99995..0.99999", "a=0.999..0.99999", "a=1000.1..1000.2", "a=log:1.00001..1.00002", "a=-7.00002..-7.0"]
)
def test_numbers_of_a_narrow_range_differ_and_stay_in_it(text):
    space = parse_space(text)
    values = [one["a"] for one in draw([space], 12, seed=0)]
    assert len(set(values)) == 12
    assert all(space.low <= value <= space.high for value in values)
    assert (space.at(0.0), space.at(1.0)) == (space.low, space.high)


def test_numbers_of_a_wide_range_are_short():
    values = [one["a"] for one in draw([parse_space("a=log:1e-6..1e-2")], 12, seed=0)]
    assert all(value == float(f"{value:.4g}") for value in values)


def test_whole_ranges_have_both_ends_and_even_shares():
    drawn = Counter(one["a"] for one in draw([parse_space("a=1..4"), parse_space("b=0.0..1.0")], 16, seed=0))
    assert drawn == {1: 4, 2: 4, 3: 4, 4: 4}
    logs = [one["a"] for one in draw([parse_space("a=log:1..100"), parse_space("b=0.0..1.0")], 40, seed=0)]
    assert min(logs) == 1
    assert 85 < max(logs) <= 100
    assert sum(value <= 10 for value in logs) == pytest.approx(40 * math.log(10.5 / 0.5) / math.log(100.5 / 0.5), abs=1)


def test_every_choice_is_drawn_equally_often():
    spaces = [parse_space("a=1,2,3"), parse_space("b=x,y"), parse_space("c=0.0..1.0")]
    drawn = draw(spaces, 12, seed=1)
    assert Counter(one["a"] for one in drawn) == {1: 4, 2: 4, 3: 4}
    assert Counter(one["b"] for one in drawn) == {"x": 6, "y": 6}


@pytest.mark.parametrize("arguments", [["a=log:1e-6..1e-4", "b=1,2", "c=0.0..1.0"], ["a=1,2,3", "b=1,2,3", "c=1,2"]])
def test_keys_vary_independently_of_each_other(arguments):
    spaces = [parse_space(argument) for argument in arguments]
    for seed in range(5):
        drawn = draw(spaces, 12, seed=seed)
        places = [space.place if isinstance(space, Range) else float for space in spaces]
        columns = [[place(one[space.key]) for one in drawn] for place, space in zip(places, spaces)]
        assert (
            np.abs(np.corrcoef(columns) - np.eye(3)).max() < 0.35
        )  # in one hypercube: 0.43 on average, 0.75 at most of 20


def test_choices_alone_are_combined_without_repetition():
    spaces = [parse_space("a=1,2,3"), parse_space("b=x,y")]
    everything = [{"a": a, "b": b} for a, b in itertools.product((1, 2, 3), "xy")]
    drawn = draw(spaces, 12, seed=0)
    assert sorted(drawn, key=str) == sorted(everything, key=str)
    part = draw(spaces, 3, seed=0)
    assert Counter(one["a"] for one in part) == {1: 1, 2: 1, 3: 1}
    assert sorted(Counter(one["b"] for one in part).values()) == [1, 2]


def test_no_two_trials_are_equal_and_a_seed_gives_the_same_ones():
    spaces = [parse_space("a=1..3"), parse_space("b=1..3")]
    drawn = draw(spaces, 8, seed=5)
    assert len({tuple(one.items()) for one in drawn}) == len(drawn) == 8
    assert draw(spaces, 8, seed=5) == drawn != draw(spaces, 8, seed=6)


@pytest.mark.parametrize(
    "value", [1, 1e-05, 0.25, True, "two words", 'a "b" \\ ü \U0001f600', [1, 2.5], {"rank": 8, "a b": ["x"]}]
)
def test_values_survive_a_command_line(value):
    assert tomllib.loads(f"value = {toml_text(value)}") == {"value": value}
