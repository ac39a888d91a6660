"""What is computed together is computed alone where somebody watches."""

import pytest
import torch
from torch import nn

from quintic.core.hooks import added, hooked


class Adding(nn.Module):
    def forward(self, x, *, plus=None):
        return 2 * x if plus is None else 2 * x + plus + 100


class Replaced(Adding):
    def forward(self, x):
        return 3 * x


def test_a_module_adds_itself_what_it_can():
    x = torch.ones(2)
    assert added(None, Adding(), x).tolist() == [2, 2]
    assert added(x, Adding(), x).tolist() == [103, 103]
    assert added(x, Replaced(), x).tolist() == added(x, nn.Threshold(0, 0), 3 * x).tolist() == [4, 4]


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                 "register_full_backward_pre_hook"],
)  # fmt: skip
def test_hooks_are_noticed_until_they_are_removed(register):
    module, x = Adding(), torch.ones(2)
    hook = getattr(module, register)(lambda *seen: None)
    assert hooked(nn.Identity(), module) and added(x, module, x).tolist() == [3, 3]
    hook.remove()
    assert not hooked(nn.Identity(), module) and added(x, module, x).tolist() == [103, 103]
