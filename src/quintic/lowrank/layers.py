"""Layers of a network that can be made smaller: how they are found, read and cut.

Hidden layers, of which neurons can be taken out:

    y = h W' + b,   h_j = act(x w_j)   or   act(x g_j) u_j        neuron j: its rows going in, its column of W going out

in the forms: neighbours Linear, elementwise activations, Linear in an ``nn.Sequential``; a module with ``gate_proj``,
``up_proj`` and ``down_proj`` as in transformers; the dense and the routed feed-forwards of :mod:`quintic.moe`; and any
Linear layers that the caller names. And linear layers by themselves, torch's or of the same name and attributes.

Legend: f neurons, d outputs, e experts, k kept neurons.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quintic.core import ConfigError, suggest
from quintic.core.precision import in_float64
from quintic.lowrank.activations import Add, Watched

__all__ = ["HiddenLayer", "LinearLayer", "Names", "find_hidden", "find_linear", "is_linear", "new_parameter"]

_Layer = TypeVar("_Layer")

Names = Sequence[str | tuple[str, ...]]
"""Layers by name or pattern; a tuple names the Linear layers that go into hidden neurons and the one out of them."""

_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Dropout, nn.Identity,
)  # fmt: skip
_GATED_NAMES = ("gate_proj", "up_proj", "down_proj")


class HiddenLayer(Watched, Protocol):
    """Neurons between what computes them and what reads them; of each part (expert) as many."""

    def parameters(self) -> list[nn.Parameter]:
        """Everything that changes size."""
        ...

    def shape(self) -> tuple[int, int, int]:
        """Inputs, neurons, outputs, of one part."""
        ...

    def outgoing(self, part: int) -> tuple[Tensor, Tensor | None]:
        """W (d, f) and b (d) of a part."""
        ...

    def incoming(self, part: int) -> Tensor:
        """(f,) norms of what goes into each neuron."""
        ...

    def cut(self, kept: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Keep neurons (k,) of each part, with new W (d, k) and b of each."""
        ...


class LinearPair:
    """One or two Linear layers into the neurons, and the Linear layer that reads them."""

    parts = 1

    def __init__(self, name: str, sources: Sequence[nn.Module], reader: nn.Module) -> None:
        self.name = name
        self.sources = [cast(nn.Linear, source) for source in sources]
        self.reader = cast(nn.Linear, reader)

    @property
    def width(self) -> int:
        return self.reader.weight.shape[1]

    def watch(self, add: Add) -> RemovableHandle:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            add(0, args[0].reshape(-1, self.width))

        return self.reader.register_forward_pre_hook(see)

    def parameters(self) -> list[nn.Parameter]:
        return [p for linear in (*self.sources, self.reader) for p in linear.parameters()]

    def shape(self) -> tuple[int, int, int]:
        return self.sources[0].weight.shape[1], self.width, self.reader.weight.shape[0]

    def outgoing(self, part: int) -> tuple[Tensor, Tensor | None]:
        return self.reader.weight.detach(), getattr(self.reader, "bias", None)

    def incoming(self, part: int) -> Tensor:
        return torch.stack([in_float64(source.weight.detach()).norm(dim=1) for source in self.sources]).prod(0)

    def cut(self, kept: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        for source in self.sources:
            at = kept[0].to(source.weight.device)
            for name, p in list(source.named_parameters(recurse=False)):
                setattr(source, name, new_parameter(p, p.detach()[at]))
            source.out_features = len(at)
        self.reader.weight = new_parameter(self.reader.weight, weights[0])
        self.reader.in_features = len(kept[0])
        if biases[0] is not None:
            self.reader.bias = new_parameter(self.reader.bias, biases[0])


class Fused:
    """A feed-forward of :mod:`quintic.moe`, by its attributes: one network, or a stack of experts."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.in_name = str(module.in_name)
        self.blocks = 2 if module.gated else 1

    @property
    def down(self) -> nn.Parameter:
        return self.module.get_parameter("down")

    @property
    def parts(self) -> int:
        return len(self.down) if self.down.ndim == 3 else 1

    @property
    def width(self) -> int:
        return self.down.shape[-1]

    def watch(self, add: Add) -> RemovableHandle:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.down.ndim == 2:
                add(0, self._neurons(args[0]).reshape(-1, self.width))
                return
            x_nd, ids_nk, gates_nk = args
            ids_m1, gates_m1 = ids_nk.reshape(-1, 1), gates_nk.reshape(-1, 1)
            h_mf = self._neurons(x_nd.repeat_interleave(ids_nk.shape[1], 0), ids_m1, gates_m1)
            for part in ids_m1.unique().tolist():
                mine = ids_m1[:, 0] == part
                h_rf = h_mf[mine]
                if module.normalize:  # what an output is divided by, its neurons are too
                    v_rd = h_rf @ self.down[part].t()
                    h_rf = h_rf * gates_m1[mine] / v_rd.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)
                add(part, h_rf)

        return self.module.register_forward_pre_hook(see)

    def _neurons(self, *args: Tensor) -> Tensor:
        """Activations, times the gate for experts: what the network returns with unit rows for its way out."""
        d, f = self.down.shape[-2:]
        bare = copy.copy(self.module)
        bare.normalize = False  # type: ignore[assignment]  # of this copy alone
        shown = []
        for start in range(0, f, d):
            rows = torch.zeros_like(self.down)
            count = min(d, f - start)
            rows[..., :count, start : start + count] = torch.eye(count, dtype=rows.dtype, device=rows.device)
            bare._parameters = {**self.module._parameters, "down": nn.Parameter(rows, requires_grad=False)}
            shown.append(bare.forward(*args)[..., : f - start])
        return torch.cat(shown, -1)

    def parameters(self) -> list[nn.Parameter]:
        return [self.module.get_parameter(self.in_name), self.down]

    def shape(self) -> tuple[int, int, int]:
        d, f = self.down.shape[-2:]
        return d, f, d

    def outgoing(self, part: int) -> tuple[Tensor, Tensor | None]:
        return (self.down[part] if self.down.ndim == 3 else self.down).detach(), None

    def incoming(self, part: int) -> Tensor:
        w_in = in_float64(self.module.get_parameter(self.in_name).detach())
        return (w_in[part] if w_in.ndim == 3 else w_in).norm(dim=1).view(self.blocks, -1).prod(0)

    def cut(self, kept: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        w_in = self.module.get_parameter(self.in_name)
        rows = torch.stack([torch.cat([at + block * self.width for block in range(self.blocks)]) for at in kept])
        stack = w_in.detach() if w_in.ndim == 3 else w_in.detach()[None]
        fewer = stack.gather(1, rows.to(w_in.device)[:, :, None].expand(-1, -1, stack.shape[2]))
        setattr(self.module, self.in_name, new_parameter(w_in, fewer.view(*w_in.shape[:-2], *fewer.shape[1:])))
        down = torch.stack(list(weights))
        self.module.down = new_parameter(self.down, down.view(*self.down.shape[:-2], *down.shape[1:]))


class LinearLayer:
    """A linear layer that is fitted by itself."""

    parts = 1

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = cast(nn.Linear, module)

    @property
    def width(self) -> int:
        """Of its input."""
        return self.module.weight.shape[1]

    def watch(self, add: Add) -> RemovableHandle:
        """Report its input."""

        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            add(0, args[0].reshape(-1, self.width))

        return self.module.register_forward_pre_hook(see)

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias."""
        return list(self.module.parameters())


def find_hidden(model: nn.Module, names: Names | None) -> list[HiddenLayer]:
    """Hidden layers of known forms in the order of the modules, or those that are named.

    Raises:
        ConfigError: There are none, a name fits none, or a weight is shared with another layer.
    """
    found: dict[str, HiddenLayer] = {}
    for path, module in model.named_modules():
        prefix = path or type(module).__name__
        if all(hasattr(module, name) for name in ("in_name", "gated", "down")):
            found[prefix] = Fused(prefix, module)
        elif all(is_linear(getattr(module, name, None)) for name in _GATED_NAMES):
            gate, up, down = (module.get_submodule(name) for name in _GATED_NAMES)
            found[prefix] = LinearPair(prefix, [gate, up], down)
        elif isinstance(module, nn.Sequential):
            found |= {pair.name: pair for pair in _neighbours(path, module)}
    pairs = [_named_pair(model, name) for name in names or () if not isinstance(name, str)]
    chosen = [*_pick(found, names), *pairs]
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no hidden layer of a known form; name the Linear layers that go into it and "
            "the one that reads it, as in layers=[('fc1', 'fc2')]"
        )
    _refuse_shared(model, {layer.name: layer.parameters() for layer in chosen})
    return chosen


def find_linear(model: nn.Module, names: Names | None) -> list[LinearLayer]:
    """Linear layers within a model, or those that are named.

    Raises:
        ConfigError: There are none, a name fits none, or a weight is shared with another layer.
    """
    if any(not isinstance(name, str) for name in names or ()):
        raise ConfigError(f"layers = {names!r}: tuples are for method='neurons'; expected names of linear layers")
    linear = {path: LinearLayer(path, module) for path, module in model.named_modules() if path and is_linear(module)}
    chosen = _pick(linear, names)
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no linear layer within it")
    _refuse_shared(model, {layer.name: layer.parameters() for layer in chosen})
    return chosen


def is_linear(module: object) -> bool:
    """Whether a module is exactly x W' + b: torch's Linear, or one of the same name and attributes."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Linear" and isinstance(weight, nn.Parameter) and weight.ndim == 2


def new_parameter(old: Tensor, value: Tensor) -> nn.Parameter:
    """A value as a parameter of the old one's dtype, device and need of a gradient."""
    return nn.Parameter(value.detach().to(old.device, old.dtype).contiguous(), requires_grad=old.requires_grad)


def _pick(found: Mapping[str, _Layer], names: Names | None) -> list[_Layer]:
    """Those whose names fit a pattern, in their own order; all if there are none.

    Raises:
        ConfigError: A pattern fits none.
    """
    if names is None:
        return list(found.values())
    patterns = [name for name in names if isinstance(name, str)]
    for pattern in patterns:
        if not any(fnmatchcase(known, pattern) for known in found):
            raise ConfigError(f"no layer of a known form is named {pattern!r}{suggest(pattern, found)}")
    return [layer for known, layer in found.items() if any(fnmatchcase(known, pattern) for pattern in patterns)]


def _refuse_shared(model: nn.Module, parameters: dict[str, list[nn.Parameter]]) -> None:
    """Make sure that a parameter that will be replaced is in one place only.

    Raises:
        ConfigError: It is not.
    """
    owners = Counter(
        id(p) for _, module in model.named_modules(remove_duplicate=False) for p in module._parameters.values()
    )
    for name, own in parameters.items():
        if any(owners[id(p)] > 1 for p in own):
            raise ConfigError(f"a weight of layer {name!r} is shared with another layer; leave it out with layers=...")


def _neighbours(prefix: str, sequence: nn.Sequential) -> list[LinearPair]:
    pairs = []
    last: tuple[str, nn.Module] | None = None
    for name, module in sequence.named_children():
        if is_linear(module):
            if last is not None:
                pairs.append(LinearPair(f"{prefix}.{last[0]}".lstrip("."), [last[1]], module))
            last = name, module
        elif not isinstance(module, _ELEMENTWISE):
            last = None
    return pairs


def _named_pair(model: nn.Module, names: tuple[str, ...]) -> LinearPair:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ConfigError(f"{type(model).__name__} has no layer {name!r}{suggest(name, modules)}")
        if not is_linear(modules[name]):
            raise ConfigError(f"{name!r} is a {type(modules[name]).__name__}; expected a Linear layer")
    if len(names) < 2:
        raise ConfigError(f"layers = {names!r}: expected the layers that go in and the one that reads, ('fc1', 'fc2')")
    pair = LinearPair(names[0], [modules[name] for name in names[:-1]], modules[names[-1]])
    if {source.weight.shape[0] for source in pair.sources} != {pair.width}:
        widths = ", ".join(str(source.weight.shape[0]) for source in pair.sources)
        raise ConfigError(f"{names[-1]!r} reads {pair.width} neurons and the layers before it have {widths}")
    return pair
