"""Networks computed so that every bit of the result is prescribed: on any processor, any number of threads, any batch.

Two kinds of operation differ between machines: sums, whose order (and fused multiply-adds) depends on the vector width,
and functions such as exp. While :class:`ExactArithmetic` is entered,

* every sum of products (convolution, matrix product, attention, the moments of a normalisation) is one of whole
  numbers: operands are rounded to p bits relative to the largest of their row (power-of-two scales, found per image),
  with 2 p + log2(terms) <= 53, so that every partial sum is a whole number below 2^53 and float64 holds it exactly in
  whatever order it is summed (20 bits for 4096 terms, close to the 24 of float32);
* exp, sigmoid, sin and cos are polynomials in a fixed order of IEEE operations;
* elementwise +, -, *, / and sqrt, and whatever only moves numbers, run as they are: IEEE-754 prescribes them;
* any other operation is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.codec.arithmetic import EXP_COEFFICIENTS, INVERSE_LN2, LN2_HIGH, LN2_LOW
from quintic.core import CodecError

__all__ = ["ExactArithmetic"]

_ELEMENTWISE = (
    "mul", "div", "sqrt", "neg", "abs", "sign", "reciprocal", "clamp", "clamp_min", "clamp_max", "maximum", "minimum",
    "relu", "floor", "round", "eq", "ne", "lt", "le", "gt", "ge", "where", "logical_and", "logical_or", "logical_not",
    "bitwise_and", "bitwise_or", "_to_copy",
)  # fmt: skip
_MOVING = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "clone", "copy_", "contiguous",
    "alias", "detach", "lift_fresh", "index", "index_select", "gather", "embedding", "pixel_shuffle",
    "pixel_unshuffle", "upsample_nearest2d", "flip", "constant_pad_nd", "repeat", "unfold", "amax", "amin",
    "max_pool2d_with_indices", "_local_scalar_dense", "arange", "full", "ones", "zeros", "empty", "full_like",
    "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_full", "scalar_tensor",
)  # fmt: skip
_AS_THEY_ARE = frozenset(_ELEMENTWISE + _MOVING)


class ExactArithmetic(TorchDispatchMode):
    """While entered, torch computes as the head of this file says, for inference.

    Raises:
        CodecError: An operation is not known to be exact.

    Example:
        >>> a = torch.tensor([[0.1, 0.2, 0.3]])
        >>> with torch.no_grad(), ExactArithmetic():
        ...     product = a @ a.T
        >>> round(product.item(), 6)
        0.14
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _REPLACED:
            # Inside __torch_dispatch__ the mode is off: these functions use torch as it is.
            return _REPLACED[name](*args, **kwargs)
        if name not in _AS_THEY_ARE:
            raise CodecError(
                f"exact mode does not know the operation {name!r} of this model; encode without it, for machines alike"
            )
        return func(*args, **kwargs)


def _whole(x: Tensor, bits: int, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Whole numbers of at most ``bits`` bits and their unit, a power of two for each slice along ``dims``."""
    x = x.double()
    exponent = torch.frexp(x.abs().amax(dims, keepdim=True)).exponent
    return torch.round(x * _power(bits - exponent)), _power(exponent - bits)


def _power(k: Tensor) -> Tensor:
    """2^k for whole |k| < 1000, by writing the exponent of a double."""
    return ((k.long() + 1023) << 52).view(torch.float64)


def _bits(terms: int) -> int:
    return (53 - math.ceil(math.log2(max(2, terms)))) // 2


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, k) @ (..., k, m) in float64."""
    bits = _bits(a.shape[-1])
    (ia, ua), (ib, ub) = _whole(a, bits, -1), _whole(b, bits, -2)
    return (ia @ ib) * ua * ub


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b).to(a.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    assert beta == 1 and alpha == 1
    return (_product(a, b) + bias.double()).to(a.dtype)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    if transposed or x.ndim != 4:
        raise CodecError("exact mode knows convolutions of images only, not transposed ones")
    bits = _bits(weight[0].numel())
    (ix, ux), (iw, uw) = _whole(x, bits, (1, 2, 3)), _whole(weight, bits, (1, 2, 3))
    out = torch.nn.functional.conv2d(ix, iw, None, stride, padding, dilation, groups) * ux * uw.view(1, -1, 1, 1)
    if bias is not None:
        out = out + bias.double().view(1, -1, 1, 1)
    return out.to(x.dtype)


def _sum_exact(x: Tensor, dims: int | tuple[int, ...], terms: int) -> Tensor:
    whole, unit = _whole(x, 2 * _bits(terms), dims)
    return whole.sum(dims, keepdim=True) * unit


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    dims = tuple(range(x.ndim)) if not dim else tuple(dim)
    out = _sum_exact(x, dims, math.prod(x.shape[i] for i in dims))
    return (out if keepdim else out.squeeze(dims)).to(dtype or x.dtype)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    dims = tuple(range(x.ndim)) if not dim else tuple(dim)
    out = _sum(x.double(), dims, keepdim) / math.prod(x.shape[i] for i in dims)
    return out.to(dtype or x.dtype)


def _normalised(x: Tensor, eps: float) -> Tensor:
    """(rows, values) to mean 0 and variance 1, float64."""
    terms = x.shape[1]
    centred = x.double() - _sum_exact(x, 1, terms) / terms
    whole, unit = _whole(centred, _bits(terms), 1)
    variance = whole.square().sum(1, keepdim=True) * unit * unit / terms
    return centred / torch.sqrt(variance + eps)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, area: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = _normalised(x.reshape(n * groups, -1), eps).view(n, c, -1)
    if weight is not None:
        out = out * weight.double()[:, None]
    if bias is not None:
        out = out + bias.double()[:, None]
    unused = x.new_empty(0)
    return out.view(x.shape).to(x.dtype), unused, unused


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = _normalised(x.reshape(-1, math.prod(shape)), eps).view(x.shape)
    if weight is not None:
        out = out * weight.double()
    if bias is not None:
        out = out + bias.double()
    unused = x.new_empty(0)
    return out.to(x.dtype), unused, unused


def _exp_double(x: Tensor) -> Tensor:
    x = x.double().clamp(-700.0, 700.0)
    k = torch.floor(x * INVERSE_LN2 + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    total = torch.zeros_like(r)
    for c in EXP_COEFFICIENTS:
        total = total * r + c
    return total * _power(k)


def _sigmoid_double(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + _exp_double(-x))


def _turned(x: Tensor, quarter: int) -> Tensor:
    """sin(x + quarter pi / 2) for |x| up to about 10^5."""
    x = x.double()
    k = torch.floor(x * (2.0 / math.pi) + 0.5)
    # pi / 2 in two parts; the first has 33 bits.
    r = (x - k * 1.5707963267341256) - k * 6.077100506506192e-11
    square = r * r
    sine, cosine = torch.zeros_like(r), torch.zeros_like(r)
    for i in range(9, -1, -1):
        sine = sine * square + (-1.0) ** i / math.factorial(2 * i + 1)
        cosine = cosine * square + (-1.0) ** i / math.factorial(2 * i)
    turn = (k.long() + quarter) % 4
    return torch.where(turn % 2 == 0, sine * r, cosine) * torch.where(turn < 2, 1.0, -1.0).double()


def _softmax_double(x: Tensor, dim: int) -> Tensor:
    powers = _exp_double(x.double() - x.double().amax(dim, keepdim=True))
    return powers / _sum_exact(powers, dim, x.shape[dim])


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _softmax_double(x, dim).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float | None = None, **options: Any) -> Any:
    if any(rest) or any(value is not None and value is not False and value != 0.0 for value in options.values()):
        raise CodecError("exact mode knows attention without mask, dropout and causality only")
    scores = _product(q, k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return _product(_softmax_double(scores, -1), v).to(q.dtype), q.new_empty(0)


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return torch.add(a, b) if alpha == 1 else torch.add(a, torch.mul(b, alpha))


def _sub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return torch.sub(a, b) if alpha == 1 else torch.sub(a, torch.mul(b, alpha))


def _pow(x: Tensor, exponent: Any) -> Tensor:
    if exponent != 2:
        raise CodecError(f"exact mode knows squares only, found the power {exponent}")
    return x * x


def _like(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).to(x.dtype)


_REPLACED: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b, alpha=1: _sub(b, a, alpha=alpha),
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "convolution": _convolution,
    "sum": _sum,
    "mean": _mean,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "exp": _like(_exp_double),
    "sigmoid": _like(_sigmoid_double),
    "silu": _like(lambda x: x.double() * _sigmoid_double(x)),
    "sin": _like(lambda x: _turned(x, 0)),
    "cos": _like(lambda x: _turned(x, 1)),
    "pow": _pow,
    "rsqrt": _like(lambda x: 1.0 / torch.sqrt(x.double())),
    "_softmax": _softmax,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
}
