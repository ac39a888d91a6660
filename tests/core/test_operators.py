"""Operators are plain functions until somebody watches the dispatcher."""

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from quintic.core.operators import operator

calls = []


def _doubled(x, times):
    calls.append(type(x))
    return x * 2**times


doubled = operator(
    "doubled_for_a_test(Tensor x, int times) -> Tensor", _doubled, lambda x, times: torch.empty_like(x),
    lambda x, times: times * x[0],
)  # fmt: skip


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_function_is_called_at_once_and_seen_where_somebody_looks():
    x = torch.ones(3)
    assert doubled(x, 2).tolist() == [4.0] * 3
    with Watch() as watch:
        assert doubled(x, 2).tolist() == [4.0] * 3
    assert watch.seen == ["quintic.doubled_for_a_test.default"]
    with FlopCounterMode(display=False) as counter:
        doubled(x, 5)
    assert counter.get_total_flops() == 15
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        doubled(x, 1)
    assert "quintic::doubled_for_a_test" in {row.key for row in seen.key_averages()}


def test_fake_tensors_have_shapes_only():
    from torch._subclasses import FakeTensorMode

    calls.clear()
    with FakeTensorMode() as mode:
        assert doubled(torch.ones(3), 2).shape == (3,)
    assert doubled(mode.from_tensor(torch.ones(3)), 2).shape == (3,) and not calls


def test_a_compiled_graph_has_it_as_one_node():
    graphs = []

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    assert torch.compile(lambda x: doubled(x, 1) + 1, backend=look, fullgraph=True)(torch.ones(3)).tolist() == [3.0] * 3
    assert graphs[0][0] == "quintic.doubled_for_a_test.default"
