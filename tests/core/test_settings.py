"""Every section of settings refuses what is no value of it, in the same words, also where it is made in Python."""

import dataclasses
import math

import numpy as np
import pytest

from quintic.core import ConfigError
from quintic.core.settings import check_least, check_names, check_types
from quintic.data import DataConfig
from quintic.data.images import ImageConfig
from quintic.diffusion import DDPMConfig
from quintic.engine import EngineConfig
from quintic.flow import TarFlowConfig
from quintic.lm import LMConfig
from quintic.optim import OptimConfig

SECTIONS = {
    "engine": EngineConfig, "optim": OptimConfig, "lm": LMConfig, "tarflow": TarFlowConfig, "ddpm": DDPMConfig,
}  # fmt: skip
ALL = [*SECTIONS.items(), ("data", DataConfig), ("data", ImageConfig)]
WRONG = {"int": (2.5, "8", True, None), "float": ("0.1", True, None), "bool": (1, "no"), "str": (3, None)}
FIELDS = [(section, kind, field) for section, kind in ALL for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("section", "kind", "field"), FIELDS, ids=lambda part: getattr(part, "name", None))
def test_a_value_of_another_type_is_named(section, kind, field):
    for wrong in WRONG[field.type]:
        with pytest.raises(ConfigError, match=rf"^setting '{section}\.{field.name}' must be of type {field.type}"):
            kind(**{field.name: wrong})


@pytest.mark.parametrize(("section", "kind", "field"), FIELDS, ids=lambda part: getattr(part, "name", None))
def test_no_number_is_nan(section, kind, field):
    if field.type == "float":
        with pytest.raises(ConfigError, match=rf"{section}\..*{field.name.split('_')[0]}"):
            kind(**{field.name: math.nan})


def test_noise_levels_are_finite():
    for name, value in (("shift", math.inf), ("log_snr_min", -math.inf), ("log_snr_max", math.inf)):
        with pytest.raises(ConfigError, match=rf"ddpm\.{name} must be finite"):
            DDPMConfig(**{name: value})


def test_whole_numbers_of_numpy_and_whole_floats_are_numbers():
    assert LMConfig(d_model=np.int64(32)).d_model == 32
    assert OptimConfig(lr=1).lr == 1
    assert EngineConfig(max_epochs=np.float32(2.0)).max_epochs == 2.0


@dataclasses.dataclass
class Sample:
    width: int = 4
    rate: float = 0.5
    rule: str = "sign"


def test_words():
    check_types("s", Sample())
    check_names("s", Sample(), {"rule": ("sign", "rms")})
    check_least("s", Sample(), {"width": 4, "rate": 0.5})
    for check, words in (
        (lambda: check_names("s", Sample(rule="sing"), {"rule": ("sign", "rms")}), "did you mean 'sign'"),
        (lambda: check_least("s", Sample(width=3), {"width": 4}), "s.width must be at least 4, found 3"),
        (
            lambda: check_least("s", Sample(rate=0.1), {"rate": 0.5}),
            "s.rate must be at least 0.5 and finite, found 0.1",
        ),
        (lambda: check_least("s", Sample(rate=math.inf), {"rate": 0}), "s.rate must be at least 0 and finite"),
    ):
        with pytest.raises(ConfigError, match=words):
            check()
