"""A mixture of experts in the place of a transformer's feed-forward, balanced without a loss.

A small transformer learns the letters of Moby Dick, once with experts that nobody balances and once with LossFree, a
bias that decides who is chosen and not how much the choice weighs. One sees MaxVio, by how much the busiest expert is
above the mean (0 is perfect, 7 would be all tokens on two of 16 experts), fall to near what chance alone would show,
while the loss stays about the same. Two lines of the loop know of experts: ``balance_step`` and the layer itself.

    python examples/moe_in_a_transformer.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic import LossFree, MoE, Muon, NoBalance, balance_step
from quintic.assets import corpus_path
from quintic.moe import sampling_floor
from quintic.moe.balance import Balance

WIDTH, CONTEXT, BATCH, EXPERTS, CHOSEN = 64, 64, 16, 16, 2


class Block(nn.Module):
    """Attention, then experts."""

    def __init__(self, balance: Balance) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, bias=False)
        self.experts = MoE(WIDTH, 32, EXPERTS, CHOSEN, balance=balance)  # was: a feed-forward of width 4 * WIDTH

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(b, t, width) -> (b, t, width)."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=hidden, need_weights=False)[0]
        return x + self.experts(self.norm2(x))


class Transformer(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, vocabulary: int, balance: Balance) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(balance) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.register_buffer("hidden", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        """(b, t) bytes -> (b, t, vocabulary)."""
        x = self.tokens(ids) + self.places.weight
        for block in self.blocks:
            x = block(x, self.hidden)
        return self.head(self.norm(x))


def train(balance: Balance, steps: int) -> tuple[float, list[float]]:
    """Mean loss of the last tenth of the steps, and MaxVio (mean over layers) of every step."""
    text = np.frombuffer(corpus_path().read_bytes(), dtype=np.uint8)
    ids = torch.from_numpy(np.unique(text, return_inverse=True)[1])
    torch.manual_seed(0)
    model = Transformer(int(ids.max()) + 1, balance)
    optimizer = Muon(model, lr=5e-3)
    losses, violations = [], []
    for step in range(steps):
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,), generator=torch.Generator().manual_seed(step))
        windows = torch.stack([ids[start : start + CONTEXT + 1] for start in starts.tolist()])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layers = balance_step(model)  # moves the biases, and tells the load of this step
        losses.append(loss.item())
        violations.append(sum(layer.max_violation for layer in layers) / len(layers))
    return sum(losses[-steps // 10 :]) / -(-steps // 10), violations


def main(argv: list[str] | None = None) -> None:
    """Train with and without balance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(argv).steps
    print(f"chance alone: MaxVio {sampling_floor(BATCH * CONTEXT, EXPERTS, CHOSEN):.2f}")
    for name, balance in (("no balance", NoBalance()), ("LossFree", LossFree())):
        loss, violations = train(balance, steps)
        last = sum(violations[-steps // 10 :]) / -(-steps // 10)
        print(f"{name:10}  first step: MaxVio {violations[0]:.2f}; last tenth: MaxVio {last:.2f}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
