"""A trained network made smaller by skeletons of what its layers do to calibration data.

Neurons (Chee, Flynn, Damle, De Sa, "Model Preserving Compression", NeurIPS 2022; posts kexue.fm/archives/10501, 10662):
with H the activations of a hidden layer and J the neurons that are kept,

    H ~ H[:, J] Z,    H W' ~ H[:, J] (W Z')'      so the next layer becomes W Z'

which for these J is the least-squares fit to the next layer's output. A constant joins the fit where the next layer
has a bias. The network keeps its form and has fewer neurons. Columns of H are chosen as the next layer weighs them:
the choice does not change if a neuron is scaled up and its outgoing weights down.

Single linear layers: :mod:`quintic.lowrank.factored`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from quintic.core import CheckpointError, ConfigError, suggest
from quintic.lowrank.activations import Forward, Map, Moments, observe, total_error
from quintic.lowrank.factored import FITS, FactoredLinear, fit_rank, prune, rank_of_share
from quintic.lowrank.layers import (
    HiddenLayer,
    LinearLayer,
    Names,
    find_hidden,
    find_linear,
    is_linear,
    new_parameter,
)
from quintic.lowrank.neurons import WEIGHT_NORMS, fit_neurons
from quintic.lowrank.selection import RULES, Method

__all__ = ["METHODS", "CompressedLayer", "Compression", "compress", "load_compressed"]

METHODS = ("neurons", *FITS, "magnitude")
"""Names accepted by :func:`compress`."""

WITHOUT_DATA = ("svd-plain", "magnitude")
"""Those that look at the weights alone."""


@dataclass(frozen=True)
class CompressedLayer:
    """What was done to a layer, and what it costs."""

    name: str
    parts: int
    """1, or experts; what follows counts all of them."""
    before: tuple[int, ...]
    """Widths of one part: inputs, neurons, outputs; or inputs, outputs of a linear layer."""
    after: tuple[int, ...]
    """The same; inputs, rank, outputs where a linear layer was given a rank."""
    parameters_before: int
    parameters_after: int
    """Non-zero ones where weights were set to zero."""
    error: float
    """Of its outputs on the calibration data, inputs as in the original: root of the squared error over the squares."""
    held_out_error: float | None
    """The same on the held-out batches, None without any."""
    samples: int
    """Activations that were seen; of the expert with the fewest."""
    kept: list[Tensor] | None = None
    """Neurons that are kept, for each part; None for other methods."""

    def shortage(self, rows: str = "rows of calibration data") -> str | None:
        """That a part saw fewer activations than it has neurons, or inputs; None if none did.

        Args:
            rows: What an activation is called.
        """
        width, what = (self.before[0], "inputs") if len(self.before) == 2 else (self.before[1], "neurons")
        which = f"an expert of {self.name}" if self.parts > 1 else self.name
        return f"{which} saw {self.samples:,} {rows} and has {width:,} {what}" if self.samples < width else None


@dataclass(frozen=True)
class _Data:
    """What every layer saw, by name and part."""

    seen: Mapping[str, list[Moments]]
    held: Mapping[str, list[Moments]] | None

    def errors(self, name: str, changes: Sequence[Map], wholes: Sequence[Map]) -> tuple[float, float | None]:
        """Of the outputs of a layer, on the calibration data and on the held-out data."""
        held = None if self.held is None else total_error(self.held[name], changes, wholes)
        return total_error(self.seen[name], changes, wholes), held


@dataclass(frozen=True, repr=False)
class Compression:
    """A compressed network and a row for each layer."""

    module: nn.Module
    method: str
    layers: list[CompressedLayer]
    parameters_before: int
    """Of the whole network."""
    parameters_after: int
    """The same, without weights that were set to zero."""

    def __repr__(self) -> str:
        rows = [("layer", "before", "after", "parameters", "error", "held out")]
        for layer in self.layers:
            held = "" if layer.held_out_error is None else f"{layer.held_out_error:.4f}"
            size = f"{layer.parameters_before:,} -> {layer.parameters_after:,}"
            times = f"{layer.parts} x " if layer.parts > 1 else ""
            before, after = (times + "-".join(map(str, widths)) for widths in (layer.before, layer.after))
            rows.append((layer.name, before, after, size, f"{layer.error:.4f}", held))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return "\n".join([f"Compression by {self.method}: {total}", *lines])


def compress(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep: float | int | Mapping[str, float | int] = 0.5,
    method: str = "neurons",
    rule: Method = "quality",
    correct: bool = True,
    layers: Names | None = None,
    held_out: Iterable[Any] | None = None,
    forward: Forward | None = None,
    in_place: bool = False,
    seed: int = 0,
) -> Compression:
    """Make a trained network smaller, so that its layers give nearly the same outputs on calibration data.

    All layers are fitted to the activations of the original network, in one pass over the data, in evaluation mode. A
    warning says so if one, or an expert, saw fewer of them than it has neurons or inputs. Where a layer has a bias, the
    fit is that of activations less their mean, and the bias makes up for the mean.

    Args:
        model: Any module with hidden or linear layers of a known form, see :mod:`quintic.lowrank.layers`.
        calibration: Batches; a tensor is ``model(batch)``, a tuple ``model(*batch)``, a mapping ``model(**batch)``.
        keep: A share (float, above 0 to 1) of the neurons, or of each linear layer's weights; or their number (int),
            which for linear layers is the rank. {layer: either}, the layer by name or pattern, chooses the layers too.
        method: ``neurons``, or one of linear layers: ``svd``, ``id``, ``cur``, ``svd-plain``, ``magnitude``.
        rule: How neurons and rows are chosen, see :data:`quintic.lowrank.RULES`; for neurons ``weight-norms`` too.
        correct: For neurons: whether the next layer makes up for those that are gone.
        layers: Names or patterns (``blocks.*.ffn``); None is all. A tuple ``("fc1", "fc2")`` names Linear layers with
            nothing but an activation between them, ``("gate", "up", "down")`` gated ones.
        held_out: Batches to measure on, beside the calibration data.
        forward: ``forward(model, batch)`` if a batch is used in another way.
        in_place: Whether to change ``model`` itself; else it is copied first. Optimizers have to be made anew.
        seed: Of whatever is drawn.

    Raises:
        ConfigError: An argument is unusable, or a layer is never reached.
        DataError: There is no calibration data, or an activation is not finite.

    Example:
        Two of these five neurons do what others do already.

        >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> with torch.no_grad():
        ...     for p in (net[0].weight, net[0].bias):
        ...         p[3:] = 2 * p[:2]
        >>> x = torch.randn(64, 4)
        >>> smaller = compress(net, [x], keep=3)
        >>> smaller.layers[0].after, torch.allclose(smaller.module(x), net(x), atol=1e-3)
        ((4, 3, 3), True)
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{suggest(method, METHODS)}")
    rules = [*RULES, WEIGHT_NORMS] if method == "neurons" else list(RULES)
    if isinstance(rule, str) and rule not in rules:
        raise ConfigError(f"unknown rule {rule!r}{suggest(rule, rules)}")
    if isinstance(keep, Mapping) and layers is None:
        layers = list(keep)
    find = find_hidden if method == "neurons" else find_linear
    for layer in find(model, layers):  # before the pass over the data, which can take long
        _size(layer, keep, method)
    before = sum(p.numel() for p in model.parameters())
    model = model if in_place else copy.deepcopy(model)
    found = find(model, layers)
    sizes = [_size(layer, keep, method) for layer in found]
    data = _Data(
        observe(model, found, calibration, forward, "the calibration data"),
        None if held_out is None else observe(model, found, held_out, forward, "the held-out data"),
    )
    if method == "neurons":
        rows = _cut_neurons(cast(list[HiddenLayer], found), sizes, data, rule, correct, seed)
        after = sum(p.numel() for p in model.parameters())
    else:
        linear = cast(list[LinearLayer], found)
        rows = [
            _fit_linear(model, layer, size, data, method, rule, seed) for layer, size in zip(linear, sizes, strict=True)
        ]
        after = before - sum(row.parameters_before - row.parameters_after for row in rows)
    if method not in WITHOUT_DATA and (correct or rule != WEIGHT_NORMS):
        for shortage in filter(None, (row.shortage() for row in rows)):
            warnings.warn(
                f"{shortage}: elsewhere its fit may be far off; give more of them, or see held_out", stacklevel=2
            )
    return Compression(model, method, rows, before, after)


def load_compressed(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give a network of the original form the shapes of a compressed one's state dict, and load it.

    Args:
        model: As it was before :func:`compress`; changed and returned.
        state: ``compress(...).module.state_dict()``.

    Raises:
        CheckpointError: The state is of another network.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> state = compress(net, [torch.randn(32, 4)], keep=5).module.state_dict()
        >>> load_compressed(net, state)[0]
        Linear(in_features=4, out_features=5, bias=True)
    """
    factored = [name.removesuffix(".kept") for name in state if name.endswith(".kept")]
    for name in factored:
        if f"{name}.order" not in state or not is_linear(dict(model.named_modules()).get(name)):
            raise CheckpointError(f"the state has factors of {name}, which is no Linear layer of this network")
        weight = model.get_submodule(name).get_parameter("weight")
        with weight.device:
            layer = FactoredLinear(weight.shape[1], len(weight), len(state[f"{name}.kept"]), f"{name}.bias" in state)
        model.set_submodule(name, layer.to(weight.dtype))
    for name, p in list(model.named_parameters()):
        if name in state and state[name].shape != p.shape:
            if state[name].ndim != p.ndim:
                raise CheckpointError(f"{name} is {tuple(state[name].shape)} in the state and {tuple(p.shape)} here")
            path, _, last = name.rpartition(".")
            owner = model.get_submodule(path)
            setattr(owner, last, new_parameter(p, state[name]))
            if isinstance(owner, nn.Linear) and last == "weight":
                owner.out_features, owner.in_features = state[name].shape
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the state is of another network: {error}") from error
    return model


def _size(layer: HiddenLayer | LinearLayer, keep: float | int | Mapping[str, float | int], method: str) -> float:
    """Neurons, or the rank, of a layer; for ``magnitude`` the share itself."""
    if isinstance(keep, Mapping):
        fitting = [value for pattern, value in keep.items() if fnmatchcase(layer.name, pattern)]
        if not fitting:
            raise ConfigError(f"keep says nothing of layer {layer.name!r}, which layers=... names")
        keep = fitting[0]
    linear = isinstance(layer, LinearLayer)
    d_out, d_in = layer.module.weight.shape if linear else (layer.width, layer.width)
    most = min(d_out, d_in)
    share = isinstance(keep, float) and 0 < keep <= 1
    count = isinstance(keep, int) and not isinstance(keep, bool) and 1 <= keep <= most and method != "magnitude"
    if not share and not count:
        what = "weights" if linear else "neurons"
        number = "" if method == "magnitude" else f", or a number from 1 to {most}"
        raise ConfigError(f"keep = {keep!r} for layer {layer.name!r}; expected a share of its {what} up to 1.0{number}")
    if count or method == "magnitude":
        return keep
    return rank_of_share(d_out, d_in, keep) if linear else max(1, round(keep * most))


def _cut_neurons(
    layers: Sequence[HiddenLayer], sizes: Sequence[float], data: _Data, rule: Method, correct: bool, seed: int
) -> list[CompressedLayer]:
    rows, fits = [], []
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        parts = data.seen[layer.name]
        # Every part draws for itself.
        fit = [
            fit_neurons(layer, part, moments, int(size), rule, correct, seed + 1000 * number + part)
            for part, moments in enumerate(parts)
        ]
        fits.append(fit)
        count = sum(p.numel() for p in layer.parameters())
        errors = data.errors(layer.name, [each.change for each in fit], [each.whole for each in fit])
        samples, kept = min(moments.rows for moments in parts), [each.kept for each in fit]
        rows.append(CompressedLayer(layer.name, layer.parts, layer.shape(), (), count, 0, *errors, samples, kept))
    # A matrix may lie between two hidden layers: everything is fitted before anything is cut.
    for layer, fit in zip(layers, fits, strict=True):
        layer.cut([each.kept for each in fit], [each.weight for each in fit], [each.bias for each in fit])
    return [
        replace(row, after=layer.shape(), parameters_after=sum(p.numel() for p in layer.parameters()))
        for layer, row in zip(layers, rows, strict=True)
    ]


def _fit_linear(
    model: nn.Module, layer: LinearLayer, size: float, data: _Data, method: str, rule: Method, seed: int
) -> CompressedLayer:
    (moments,) = data.seen[layer.name]
    old, bias = layer.module.weight, getattr(layer.module, "bias", None)
    W = old.detach().to(moments.gram)
    b = W.new_zeros(len(W)) if bias is None else bias.detach().to(W)
    before, shift = (W.shape[1], W.shape[0]), torch.zeros_like(b)
    if method == "magnitude":
        made = prune(W, size)
        after, count = before, int(made.count_nonzero())
        layer.module.weight = new_parameter(old, made)
    else:
        T = moments.factor(centred=bias is not None)
        kept, rest, order = fit_rank(W, T, int(size), method, rule=rule, seed=seed)
        made = torch.empty_like(W).index_copy(0, order, torch.cat([kept, rest @ kept]))
        if bias is not None and method != "svd-plain":
            shift = (W - made) @ moments.mean
        after, count = (before[0], int(size), before[1]), kept.numel() + rest.numel()
        model.set_submodule(layer.name, FactoredLinear.of(old, kept, rest, order, None if bias is None else b + shift))
    errors = data.errors(layer.name, [(made - W, shift)], [(W, b)])
    constants = 0 if bias is None else bias.numel()
    return CompressedLayer(
        layer.name, 1, before, after, W.numel() + constants, count + constants, *errors, moments.rows
    )
