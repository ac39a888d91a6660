"""A trained dense feed-forward network, cut into experts with a router that predicts their norms.

Post: https://kexue.fm/archives/10699. f(x A) B with the columns of A and the rows of B in n blocks is a sum of n
expert vectors, and that is exact, gated or not:

    y = sum of v_i,   v_i = f(x A_i) B_i   (gated: with the i-th blocks of both input projections)

The router is fitted to what it is to predict, rho_i = relu(x w_i + c_i) ~ ||v_i||, by least squares on given data.

Legend: t tokens, e (or n) experts, d width, f width of one expert, h = 2 f (gated) or f.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quintic.core import ConfigError, DataError
from quintic.core.precision import in_float64
from quintic.moe.activation import activate_, halves
from quintic.moe.balance import Balance, NoBalance
from quintic.moe.feedforward import FeedForward
from quintic.moe.geometry import (
    EXHAUSTIVE,
    best_errors,
    gram_matrices,
    orthogonal_errors,
    random_errors,
    ranked_errors,
)
from quintic.moe.layer import MoE

__all__ = ["DenseSplit", "split_dense"]

_RIDGES = [10.0 ** (i / 2) for i in range(-8, 5)]  # times tokens and the mean square of an input
_HELD_OUT = 5  # every fifth token measures, the others fit
_CHUNK = 256  # tokens whose expert vectors exist at a time
_SEARCHED = 256  # tokens for which the best subset is searched

_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class DenseSplit:
    """Experts of a dense network, and how well a few of them stand for all, on tokens that did not fit the router."""

    w_in_ehd: Tensor
    """(experts, hidden or 2 * hidden, width) input projections."""
    w_out_edf: Tensor
    """(experts, width, hidden) output projections."""
    activation: str
    """A name of :data:`quintic.moe.activation.ACTIVATIONS`."""
    router_weight_ed: Tensor
    """(experts, width) w."""
    router_offset_e: Tensor
    """(experts,) c."""
    true_norms_te: Tensor
    """(held-out tokens, experts) ||v_i||."""
    predicted_norms_te: Tensor
    """(held-out tokens, experts) rho_i."""
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Squared error over squared norm of y, for k = 0 ... n: ``norm`` and ``router`` (largest true and predicted
    norms), ``random`` (expectation), ``best`` (any subset), ``orthogonal`` (what ``norm`` would be were the v_i so)."""

    @property
    def num_experts(self) -> int:
        """n."""
        return len(self.w_in_ehd)

    @property
    def r2(self) -> float:
        """Share of the variance of the norms, around each expert's mean, that the router predicts."""
        true = self.true_norms_te
        return 1.0 - float((true - self.predicted_norms_te).square().sum() / (true - true.mean(0)).square().sum())

    def to_moe(self, top_k: int, *, normalize_experts: str | None = None, balance: Balance | None = None) -> MoE:
        """A layer of these experts.

        Args:
            top_k: Experts per token; all of them give the dense network back.
            normalize_experts: None: the chosen v_i with gate 1; exact for k = n, and only the experts have a gradient.
                ``"l2"``: the post's rho_i v_i / ||v_i||, with the predicted norm; the router learns too.
            balance: Of the layer; :class:`quintic.moe.NoBalance` if not given.

        Raises:
            ConfigError: ``top_k`` or ``normalize_experts`` is out of range.
        """
        if normalize_experts not in (None, "l2"):
            raise ConfigError(
                f"normalize_experts must be None or 'l2' (the router predicts a 2-norm), found {normalize_experts!r}"
            )
        experts, height, width = self.w_in_ehd.shape
        hidden = self.w_out_edf.shape[2]
        with self.w_in_ehd.device:
            moe = MoE(
                width, hidden, experts, top_k, num_shared=0, score="one" if normalize_experts is None else "relu",
                select="relu", normalize_gates=False, normalize_experts=normalize_experts, route_scale=1.0,
                router_offset=True, activation=self.activation, gated=height == 2 * hidden,
                balance=NoBalance() if balance is None else balance, initialize=False,
            ).to(self.w_in_ehd.dtype)  # fmt: skip
        with torch.no_grad():
            moe.experts.get_parameter(moe.experts.in_name).copy_(self.w_in_ehd)
            moe.experts.down.copy_(self.w_out_edf)
            moe.router.weight.copy_(self.router_weight_ed)
            moe.router.get_parameter("offset").copy_(self.router_offset_e)
        return moe

    def __repr__(self) -> str:
        n = self.num_experts
        names = ("best", "norm", "router", "random", "orthogonal")
        search = "" if n <= EXHAUSTIVE else "; best: a search, not exhaustive"
        lines = [
            f"DenseSplit: {n} experts of width {self.w_out_edf.shape[2]}, {self.activation}; "
            f"router predicts norms with R^2 = {self.r2:.3f}",
            f"squared error over squared norm, by how the k experts are chosen{search}",
            f"{'k':>4}" + "".join(f"{name:>12}" for name in names),
        ]
        shown = [k for k in (2**i for i in range(n.bit_length())) if k < n] + [n]
        lines += [f"{k:>4}" + "".join(f"{self.errors[name][k]:>12.4f}" for name in names) for k in shown]
        return "\n".join(lines)


@torch.no_grad()
def split_dense(ffn: nn.Module, num_experts: int, calibration: Tensor) -> DenseSplit:
    """Cut a trained feed-forward network into experts and fit a router to their norms.

    Args:
        ffn: A :class:`quintic.moe.feedforward.FeedForward`; a module with ``gate_proj``, ``up_proj``, ``down_proj``
            and ``act_fn`` as in transformers; or ``nn.Sequential(Linear, activation, Linear)``. Without biases.
        num_experts: n; divides the hidden width. Experts are consecutive blocks of it.
        calibration: (..., width) inputs of the network, some hundreds of tokens or more; every fifth token is held
            out to measure.

    Raises:
        ConfigError: The network is of another form, has biases, or does not divide.
        DataError: The calibration data has another width, too few tokens or numbers that are not finite.

    Example:
        On random weights the norm recovers more than half of what the best choice gains over chance.

        >>> g = torch.Generator().manual_seed(0)
        >>> ffn = torch.nn.Sequential(*(torch.nn.Linear(64, 256, bias=False), torch.nn.ReLU(),
        ...                             torch.nn.Linear(256, 64, bias=False)))
        >>> for p in ffn.parameters():
        ...     p = p.data.normal_(0, p.shape[1] ** -0.5, generator=g)
        >>> split = split_dense(ffn, 8, torch.randn(400, 64, generator=g))
        >>> best, norm, random = (split.errors[name][4] for name in ("best", "norm", "random"))
        >>> 0.5 < (random - norm) / (random - best) < 1
        True
        >>> x = torch.randn(5, 64, generator=g)
        >>> torch.allclose(split.to_moe(8)(x), ffn(x), atol=1e-5)
        True
    """
    w_in_hd, w_out_df, activation = _weights(ffn)
    width, hidden = w_out_df.shape
    if num_experts < 1 or hidden % num_experts:
        raise ConfigError(f"num_experts must divide the hidden width of {hidden}, found {num_experts}")
    if calibration.shape[-1] != width:
        raise DataError(f"calibration has width {calibration.shape[-1]}, the network has {width}")
    wide = torch.promote_types(w_in_hd.dtype, torch.float32)  # half precision would blur what is measured
    x_td = calibration.reshape(-1, width).to(w_in_hd.device, wide)
    held = torch.arange(len(x_td), device=x_td.device) % _HELD_OUT == 0
    if len(x_td) < 2 * _HELD_OUT:
        raise DataError(f"calibration has {len(x_td)} tokens; at least {2 * _HELD_OUT} are needed, better hundreds")
    if not x_td.isfinite().all():
        raise DataError("calibration has numbers that are not finite; leave such tokens out")

    f = hidden // num_experts
    w_in_ehd = torch.cat([part.unflatten(0, (num_experts, f)) for part in w_in_hd.split(hidden)], dim=1)
    w_out_edf = w_out_df.unflatten(1, (num_experts, f)).transpose(0, 1).contiguous()

    weights = w_in_ehd.to(wide), w_out_edf.to(wide)
    chunks = [_vectors(chunk, *weights, activation) for chunk in x_td[~held].split(_CHUNK)]
    weight_ed, offset_e = _fit(x_td[~held], torch.cat([v.norm(dim=-1) for v in chunks]))
    chunks = [_vectors(chunk, *weights, activation) for chunk in x_td[held].split(_CHUNK)]
    true_te = torch.cat([v.norm(dim=-1) for v in chunks])
    predicted_te = torch.relu(x_td[held] @ weight_ed.t() + offset_e)
    gram_tee = torch.cat([gram_matrices(v) for v in chunks]).cpu()
    return DenseSplit(
        w_in_ehd, w_out_edf, activation, weight_ed, offset_e, true_te, predicted_te,
        _errors(gram_tee, true_te.cpu(), predicted_te.cpu()),
    )  # fmt: skip


def _errors(gram_tee: Tensor, true_te: Tensor, predicted_te: Tensor) -> dict[str, list[float]]:
    found = {
        "norm": ranked_errors(gram_tee, true_te),
        "router": ranked_errors(gram_tee, predicted_te),
        "random": random_errors(gram_tee),
        "orthogonal": orthogonal_errors(gram_tee),
    }
    relative = {name: error_tk.sum(0) / gram_tee.sum() for name, error_tk in found.items()}
    some_tee = gram_tee[:: -(-len(gram_tee) // _SEARCHED)]
    relative["best"] = best_errors(some_tee).sum(0) / some_tee.sum()
    # Orthogonal vectors would also have another sum.
    relative["orthogonal"] = found["orthogonal"].sum(0) / found["orthogonal"][:, 0].sum()
    return {name: error_k.tolist() for name, error_k in relative.items()}


def _vectors(x_td: Tensor, w_in_ehd: Tensor, w_out_edf: Tensor, activation: str) -> Tensor:
    """(tokens, experts, width): what each expert adds."""
    h_teh = torch.einsum("td,ehd->teh", x_td, w_in_ehd)
    a_tef = h_teh.new_empty(*h_teh.shape[:2], w_out_edf.shape[2])
    activate_(activation, halves(h_teh, a_tef.shape[-1]), a_tef)
    return torch.einsum("tef,edf->ted", a_tef, w_out_edf)


def _fit(x_td: Tensor, norms_te: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of the norms on the input and a constant, in float64.

    The ridge is the one of least generalised cross-validation error (Golub, Heath and Wahba, 1979), since few tokens
    for the width would else fit their noise.
    """
    like, x_td, norms_te = x_td, in_float64(x_td), in_float64(norms_te)
    mean_d, mean_e = x_td.mean(0), norms_te.mean(0)
    centred_td = x_td - mean_d
    value_d, vector_dd = torch.linalg.eigh(centred_td.t() @ centred_td)
    value_d = value_d.clamp(min=0.0)
    along_de = vector_dd.t() @ (centred_td.t() @ (norms_te - mean_e))
    total, power_d = (norms_te - mean_e).square().sum(), along_de.square().sum(1)

    def validation(ridge: float) -> float:
        kept_d = value_d / (value_d + ridge)
        residual = total - (power_d / (value_d + ridge) * (2.0 - kept_d)).sum()
        return float(residual / (len(x_td) - 1.0 - kept_d.sum()).square())

    unit = len(x_td) * float(centred_td.square().mean().clamp(min=1e-30))
    ridge = min((unit * each for each in _RIDGES), key=validation)
    weight_ed = (vector_dd @ (along_de / (value_d + ridge).unsqueeze(1))).t()
    return weight_ed.to(like), (mean_e - weight_ed @ mean_d).to(like)


def _weights(ffn: nn.Module) -> tuple[Tensor, Tensor, str]:
    """(fused input projection, output projection, activation) of a network of a known form."""
    if isinstance(ffn, FeedForward):
        return ffn.get_parameter(ffn.in_name).detach(), ffn.down.detach(), ffn.activation
    if all(isinstance(getattr(ffn, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        linears = [ffn.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
        act = getattr(ffn, "act_fn", None)
    elif isinstance(ffn, nn.Sequential) and [isinstance(part, nn.Linear) for part in ffn] == [True, False, True]:
        linears, act = [ffn[0], ffn[2]], ffn[1]
    else:
        raise ConfigError(
            f"split_dense does not know the form of {type(ffn).__name__}; expected a FeedForward of quintic.moe, "
            "a module with gate_proj, up_proj, down_proj and act_fn, or nn.Sequential(Linear, activation, Linear)"
        )
    if any(linear.bias is not None for linear in linears):
        raise ConfigError("the network has biases, which experts here do not; a bias-free network is needed")
    weights = [linear.get_parameter("weight").detach() for linear in linears]
    return torch.cat(weights[:-1]), weights[-1], _activation_name(act)


def _activation_name(act: object) -> str:
    kind = type(act).__name__
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if kind not in _ACTIVATIONS:
        raise ConfigError(
            f"activation {kind} is not supported; expected one of {', '.join(sorted(_ACTIVATIONS))}, GELU"
        )
    return _ACTIVATIONS[kind]
