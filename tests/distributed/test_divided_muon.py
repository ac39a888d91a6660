"""Muon, AdamW, clipping and the cap on parameters divided among processes, against whole ones."""

import pytest
import torch
from tests.distributed.processes import all_agree

from quintic.core import ConfigError
from quintic.optim import Muon


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (2, 1), (4, 2), (4, 4)])
def test_divided_and_whole_agree(ranks, shards):
    all_agree(ranks, "divided_muon.py", shards)


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="unknown distributed 'owners'; did you mean 'owner'"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], distributed="owners")
