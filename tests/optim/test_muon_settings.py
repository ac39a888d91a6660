"""Settings and parameters that are refused at once, and the warning about Adam's rate."""

import warnings

import pytest
import torch
from tests.optim.toy import parameters
from torch import nn

from quintic.core import ConfigError
from quintic.optim import Muon, convert_lr


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": torch.ones(2)}, "0-d tensor"),
        ({"momentum": 1.5}, "momentum = 1.5"),  # torch.optim.Muon accepts it
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"scale": "moonlit"}, "did you mean 'moonlight'"),
        ({"method": "grm"}, "did you mean 'gram'"),
        ({"coefficients": "quntic"}, "did you mean 'quintic'"),
        ({"ns_coefficients": (1.0, 2.0)}, "triple"),
        ({"ns_steps": 0}, "from 1 to 100"),
        ({"adjust_lr_fn": "match_rms"}, "did you mean 'match_rms_adamw'"),
        ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\]"),
        ({"adamw_eps": -1.0}, "adamw_eps"),
        ({"lr": "1e-3"}, "lr = '1e-3'; expected a number, found str"),  # what YAML makes of 1e-3
        ({"weight_decay": None}, "weight_decay = None; expected a number"),
        ({"adamw_betas": 0.9}, "adamw_betas = 0.9; expected two numbers"),
        ({"adamw_betas": (0.9,)}, "expected two numbers"),
        ({"cap": "10"}, "cap = '10'; expected a positive number"),
        ({"norm": "spectral"}, "unknown norm 'spectral'"),
        ({"coefficients": "quintc"}, "did you mean 'quintic'"),
    ],
)
def test_wrong_settings_are_refused_at_construction(keywords, message):
    with pytest.raises(ConfigError, match=message):
        Muon(parameters((3, 4)), **keywords)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [nn.Parameter(torch.zeros(5))]}, r"\(5,\) is not a matrix.*adamw"),
        ({"params": [nn.Parameter(torch.zeros(()))]}, "is not a matrix"),
        ({"params": [("conv", nn.Parameter(torch.zeros(4, 3, 3, 3)))]}, r"'conv' .*layout='conv'"),
        ({"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]}, "real floating-point"),
        ({"params": [nn.Parameter(torch.zeros(2, 2))], "layout": "convolution"}, "unknown layout"),
        ({"params": [nn.Parameter(torch.zeros(2, 2))], "algorithm": "adam"}, "did you mean 'adamw'"),
        ({"params": [nn.Parameter(torch.zeros(2, 2))], "momentum": 2.0}, "momentum"),
    ],
)
def test_what_is_not_a_matrix_is_refused_at_once(group, message):
    """torch.optim.Muon.add_param_group accepts 1-D parameters and fails at the step."""
    with pytest.raises(ConfigError, match=message):
        Muon([dict(group)])
    first = nn.Parameter(torch.zeros(3, 3))
    optimizer = Muon([("first", first)] if isinstance(group["params"][0], tuple) else [first])
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("shape", [(16,), (0,), ()])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_matrices_that_were_flattened_or_sharded_away_are_refused_at_the_step(shape, with_gradient):
    """Under some engines Muon silently never runs, since all it gets are flat or empty tensors."""
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([("deep.weight", p)])
    p.data = torch.zeros(shape)
    p.grad = torch.zeros(shape) if with_gradient else None
    with pytest.raises(ConfigError, match=r"'deep\.weight' was a matrix.*fully_shard"):
        optimizer.step()


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Embedding(5, 2), nn.Conv1d(2, 3, 3)])
def test_a_module_whose_matrices_are_gone_is_refused_at_once(layer):
    layer.weight.data = torch.zeros(0)
    with pytest.raises(ConfigError, match=r"^1\.weight of .*sharded away"):
        Muon(nn.Sequential(nn.Linear(4, 4), layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_gram_in_half_precision_and_other_dtypes_are_refused_at_once(dtype):
    (p,) = parameters((3, 9))
    with pytest.raises(ConfigError, match=str(dtype).removeprefix("torch.")):
        Muon([p], method="gram", ns_dtype=dtype)


def test_a_parameter_listed_twice_is_refused():
    (p,) = parameters((3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="twice"):
            Muon([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Muon([{"params": [p]}, {"params": [p]}])


def test_adams_rate_under_a_scale_of_order_one_is_warned_of_once():
    with pytest.warns(UserWarning, match="looks like Adam's") as caught:
        Muon([{"params": [p]} for p in parameters((3, 3), (3, 4))], lr=1e-3, scale="keller")
    assert len(caught) == 1 and caught[0].filename == __file__  # the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon(parameters((3, 3)), lr=1e-3)
        Muon([{"params": parameters((3, 3)), "algorithm": "adamw"}], lr=1e-3, scale="keller")
        Muon(parameters((3, 3)), lr=convert_lr(1e-3, 0.1, "moonlight", "keller", 1024).lr, scale="keller")


def test_a_rate_of_zero_is_allowed_and_moves_nothing():
    (p,) = parameters((3, 4))
    p.grad, before = torch.ones(3, 4), p.detach().clone()
    Muon([p], lr=0.0, weight_decay=0.5).step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("betas", "expected adamw_betas"),
        ("eps", "expected adamw_eps"),
        ("use_muon", "expected algorithm='muon' or 'adamw'"),
        ("adjust_lr_fn", "expected scale='keller'"),
        ("ns_coefficients", "expected coefficients"),
        ("algoritm", "did you mean 'algorithm'"),
        ("weightdecay", "did you mean 'weight_decay'"),
    ],
)
def test_a_setting_of_a_group_that_would_do_nothing_is_refused(name, message):
    (p, q) = parameters((3, 3), (2, 3))
    optimizer = Muon([{"params": [p], "initial_lr": 0.1, "max_momentum": 0.9, "my_note": "x"}])  # nobody's business
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [q], name: 1})
    assert len(optimizer.param_groups) == 1
