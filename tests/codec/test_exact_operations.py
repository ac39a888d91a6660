"""Every operation that exact mode replaces, against torch in float64, and independence of the order of sums."""

import pytest
import torch
from torch.nn import functional as F

from quintic.codec.exact import ExactArithmetic
from quintic.core import CodecError


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = numbers(2, 6, 5, 4)
# Weights and biases (b), drawn beforehand: exact mode knows no random numbers.
W2x5x3 = numbers(2, 5, 3)
W2x6x1x1 = numbers(2, 6, 1, 1, seed=1)
W3b = numbers(3, seed=2)
W3x4 = numbers(3, 4, seed=1)
W4b = numbers(4, seed=2)
W4x3 = numbers(4, 3, seed=1)
W4x3x3x3 = numbers(4, 3, 3, 3, seed=1)
W5x4 = numbers(5, 4, seed=1)
W5x4b = numbers(5, 4, seed=2)
W6 = numbers(6, seed=1)
W6b = numbers(6, seed=2)
W6x2x3x3 = numbers(6, 2, 3, 3)
OPERATIONS = {
    "sum of all": lambda x: x.sum(),
    "sum over axes": lambda x: x.sum((1, 3)),
    "sum kept": lambda x: x.sum(-1, keepdim=True),
    "mean of all": lambda x: x.mean(),
    "mean over an axis": lambda x: x.mean(2),
    "mean kept": lambda x: x.mean((2, 3), keepdim=True),
    "group norm": lambda x: F.group_norm(x, 3, W6.to(x), W6b.to(x)),
    "group norm without weights": lambda x: F.group_norm(x, 2),
    "layer norm": lambda x: F.layer_norm(x, (5, 4), W5x4.to(x), W5x4b.to(x)),
    "layer norm without weights": lambda x: F.layer_norm(x, (4,)),
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sine": lambda x: torch.sin(64 * x),
    "cosine": lambda x: torch.cos(64 * x),
    "square": lambda x: x**2,
    "reciprocal root": lambda x: torch.rsqrt(x.abs() + 0.1),
    "softmax": lambda x: torch.softmax(3 * x, -1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(2), x.flip(1)),
    "attention of a scale": lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
    "product": lambda x: x[0, 0] @ W4x3.to(x),
    "products": lambda x: x[0] @ x[1].transpose(1, 2),
    "linear": lambda x: F.linear(x[0, 0], W3x4.to(x), W3b.to(x)),
    "convolution": lambda x: F.conv2d(x, W4x3x3x3.to(x), W4b.to(x), 2, 1, groups=2),
    "convolution without bias": lambda x: F.conv2d(x, W2x6x1x1.to(x)),
    "a sum of parts": lambda x: torch.add(x, x, alpha=0.5) - torch.sub(x, x.flip(0), alpha=2) + torch.rsub(x, 1.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_an_operation_is_that_of_float64_rounded_once(name):
    with ExactArithmetic():
        found = OPERATIONS[name](X)
    wanted = OPERATIONS[name](X.double())
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    # A few bits above float32's: operands are cut to half of float64's bits.
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


@torch.no_grad()
def test_sums_and_products_do_not_depend_on_the_order_of_their_terms():
    x = numbers(3, 4000) * torch.logspace(-3, 3, 4000)
    y = x[:, torch.randperm(4000, generator=torch.Generator().manual_seed(5))]
    functions = (lambda v: v.sum(1), lambda v: v.mean(1), lambda v: v @ v.T, lambda v: torch.softmax(v, 1).sum(1))
    with ExactArithmetic():
        pairs = [(f(x), f(y)) for f in functions]
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not torch.equal(x.sum(1), y.sum(1))  # as torch adds, it does


@pytest.mark.parametrize(
    ("words", "operation"),
    [
        ("power 3", lambda: X**3),
        ("'erf'", lambda: torch.erf(X)),
        ("not transposed ones", lambda: F.conv_transpose2d(X, W6x2x3x3)),
        ("convolutions of images only", lambda: F.conv1d(X[0], W2x5x3)),
        ("attention without mask", lambda: F.scaled_dot_product_attention(X, X, X, is_causal=True)),
    ],
)
@torch.no_grad()
def test_what_is_not_known_to_be_exact_is_refused(words, operation):
    with ExactArithmetic(), pytest.raises(CodecError, match=words):
        operation()


def test_a_softmax_of_large_scores_does_not_overflow():
    x = torch.tensor([[2000.0, 1999.0, -2000.0]])
    with torch.no_grad(), ExactArithmetic():
        found = torch.softmax(x, -1)
    torch.testing.assert_close(found, torch.softmax(x, -1))
