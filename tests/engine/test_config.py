"""Settings: presets, overrides, types, sources, round trip through TOML."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintic.core import ConfigError
from quintic.engine.config import EngineConfig, Settings, field_help


@dataclass(frozen=True)
class Sample:
    number: int = 1
    """A whole number."""
    rate: float = 0.5
    flag: bool = False
    word: str = "a"


@dataclass(frozen=True)
class Wordy:
    number: int = 1
    """What is said in two lines,
    of a table's row."""


TYPES = {"engine": EngineConfig, "sample": Sample}


def build(*overrides, preset=None):
    return Settings.build(TYPES, preset or {}, "laptop", overrides)


def test_later_wins_and_the_source_is_kept():
    settings = build("sample.number=3", preset={"sample": {"number": 2, "rate": 1}})
    assert settings["sample"] == Sample(number=3, rate=1.0)
    assert settings.sources["sample.number"] == "given"
    assert settings.sources["sample.rate"] == "preset laptop"
    assert settings.sources["sample.flag"] == "default"
    derived = settings.derive("sample.word", "b", "because")
    assert (derived["sample"].word, derived.sources["sample.word"]) == ("b", "because")
    assert settings["sample"].word == "a"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sample.number=1e4", Sample(number=10_000)),
        ("sample.rate=1", Sample(rate=1.0)),
        ("sample.rate=.25", Sample(rate=0.25)),
        ("sample.rate=5.", Sample(rate=5.0)),
        ("sample.rate=inf", Sample(rate=float("inf"))),
        ("sample.flag=true", Sample(flag=True)),
        ("sample.word=muon", Sample(word="muon")),
        ("sample.word=3", Sample(word="3")),
        ("sample.word=a/b c.json", Sample(word="a/b c.json")),
        ('sample.word="quoted"', Sample(word="quoted")),
        ("sample.word=a=b", Sample(word="a=b")),
        ("sample.word=", Sample(word="")),
    ],
)
def test_values_from_text(override, expected):
    assert build(override)["sample"] == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sample.numbr=1", "unknown setting 'sample.numbr'; did you mean 'sample.number'"),
        ("sampel.number=1", "did you mean 'sample.number'"),
        ("sample.number=1.5", "must be of type int, found 1.5"),
        ("sample.number=x", "must be of type int, found 'x'"),
        ("sample.flag=1", "must be of type bool"),
        ("sample.flag=True", r"must be of type bool \(true or false\), found 'True'"),
        ("sample.rate=fast", "must be of type float, found 'fast'"),
        ("engine.max_epochs=inf", "engine.max_epochs must be at least 0 and finite, found inf"),
        ("engine.max_epochs=nan", "engine.max_epochs must be at least 0 and finite, found nan"),
        ("engine.ema_decay=nan", "engine.ema_decay must be at least 0 and finite, found nan"),
        ("sample.number=true", "must be of type int"),
        ("engine.steps=-1", "engine.steps must be at least 0"),
        ("engine.steps=0", "set one"),
    ],
)
def test_mistakes_name_the_setting(override, message):
    with pytest.raises(ConfigError, match=message):
        build(override)


@given(st.text(max_size=30), st.floats(allow_nan=False), st.integers(-(2**40), 2**40), st.text(max_size=20))
def test_toml_round_trip(word, rate, number, source):
    settings = (
        build()
        .derive("sample.word", word, source)
        .derive("sample.rate", rate, "b\nc")
        .derive("sample.number", number, "")
    )
    text = settings.to_toml({"task": "lm", "paths": [word], "ok": True})
    back = Settings.from_toml(text, TYPES)
    assert back.sections == settings.sections
    assert set(back.sources.values()) == {"config.toml"}


def test_damaged_and_foreign_toml():
    with pytest.raises(ConfigError, match="damaged"):
        Settings.from_toml("[engine", TYPES)
    with pytest.raises(ConfigError, match=r"unknown setting 'engine\.stepz'"):
        Settings.from_toml("[engine]\nstepz = 3", TYPES)


def test_help_comes_from_the_fields():
    assert field_help(Sample) == {"number": "A whole number."}
    assert field_help(Wordy) == {"number": "What is said in two lines, of a table's row."}
    assert set(field_help(EngineConfig)) == set(EngineConfig.__dataclass_fields__)
