"""What would make the host wait for an accelerator: numbers read from a tensor, or shapes that depend on them.

The meta device has no numbers, so what runs on it reads none.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from quintic.moe import AuxLoss, LossFree, MoE, ZLoss, balance_step, meter, replay, routed
from quintic.moe.router import Routing


@pytest.mark.parametrize("normalize", [False, True])
def test_the_grouped_product_reads_no_counts(normalize, monkeypatch):
    monkeypatch.setattr(routed, "grouped_is_legal", lambda dtype, widths, device: device.type == "meta")
    x, gates = (torch.empty(40, size, dtype=torch.bfloat16, device="meta") for size in (16, 2))
    w_in, w_out = (torch.empty(4, *size, dtype=torch.bfloat16, device="meta") for size in ((16, 16), (16, 8)))
    ids = torch.empty(40, 2, dtype=torch.int64, device="meta")
    y, *kept = routed._forward(x, ids, gates, w_in, w_out, "silu", normalize)
    gradients = routed._backward(y, x, gates, w_in, w_out, *kept, "silu", normalize, 3 * [True])
    assert [t.shape for t in (y, *gradients)] == [t.shape for t in (x, x, gates, w_in, w_out)]


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "relu", "smooth_topk"])
@pytest.mark.parametrize("masked", [False, True])
def test_choice_and_counting_read_nothing(masked, score):
    balance = LossFree("quantile") + AuxLoss(0.1) + AuxLoss(0.1, over="sequence", kind="entropy") + ZLoss()
    layer = MoE(16, 8, 8, 2, num_groups=4, top_groups=2, score=score, balance=balance).to("meta")
    logits = torch.empty(40, 8, device="meta", requires_grad=True)
    mask = torch.empty(40, dtype=torch.bool, device="meta") if masked else None
    ids, gates, scores, biased = layer.router.choose(logits)
    routing = Routing(ids, gates, layer.counts.clone(), logits, scores, biased)
    meter._count_routing(*layer.meter.counters, routing.counts_e, biased, scores.detach(), mask, 2)
    loss = balance.loss(routing, mask, (4, 10), layer.counts)
    meter._count_loss(layer.meter.sums, loss.detach())
    (gates.sum() + loss).backward()
    assert logits.grad.shape == logits.shape
    assert replay._kept_routing(ids, 3 * [ids]).shape == ids.shape


class Reads(TorchFunctionMode):
    """Counts what is read of given tensors and of all that is computed from them, as far as ``cpu``."""

    def __init__(self, tensors):
        super().__init__()
        self.there, self.reads = {id(t): t for t in tensors}, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [each for part in args for each in (part if isinstance(part, list | tuple) else [part])]
        if not any(id(each) in self.there for each in given):
            return out
        if func.__name__ == "cpu":
            self.reads += 1
            return out.clone()  # of a tensor that is there already it is the same
        made = out if isinstance(out, list | tuple) else [out]
        self.there |= {id(each): each for each in made if isinstance(each, torch.Tensor)}
        self.reads += func.__name__ in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")
        return out


@pytest.mark.parametrize("rule", ["floored-rms", "quantile", "sign"])
def test_a_step_of_balance_waits_once_for_counts_and_once_for_biases(rule):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(MoE(16, 8, 4, 2, balance=LossFree(rule)) for _ in range(5)))
    model(torch.randn(30, 16))
    with Reads([t for layer in model for t in (*layer.meter.counters, layer.router.bias)]) as reads:
        stats = balance_step(model)
    assert reads.reads == 2
    assert [each.tokens for each in stats] == 5 * [30] and all(layer.router.bias.any() for layer in model)
