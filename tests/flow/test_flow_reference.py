"""State dicts of the authors' code: read, and computed as an independent reading of the paper computes them."""

import math

import pytest
import torch

from quintic.core import CheckpointError
from quintic.flow import load_reference

HEAD = 64


def state_dict(shape, patch, width=64, blocks=3, layers=2, classes=0, shifts_only=False, seed=0):
    """Random weights under the names of apple/ml-tarflow."""
    generator = torch.Generator().manual_seed(seed)

    def r(*size, scale=0.05):
        return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

    c, h, w = shape
    n, d = h // patch * (w // patch), c * patch * patch
    state = {"var": torch.ones(n, d, dtype=torch.float64)}
    for i in range(blocks):
        p = f"blocks.{i}."
        state |= {p + "proj_in.weight": r(width, d, scale=0.3), p + "proj_in.bias": r(width)}
        state |= {p + "pos_embed": r(n, width), p + "attn_mask": torch.tril(torch.ones(n, n, dtype=torch.float64))}
        if classes:
            state[p + "class_embed"] = r(classes, 1, width, scale=0.5)
        for j in range(layers):
            q = f"{p}attn_blocks.{j}."
            for norm in ("attention.norm", "mlp.norm"):
                state |= {f"{q}{norm}.weight": 1 + r(width), f"{q}{norm}.bias": r(width)}
            for name, rows, columns in (
                ("attention.qkv", 3 * width, width),
                ("attention.proj", width, width),
                ("mlp.main.0", 4 * width, width),
                ("mlp.main.2", width, 4 * width),
            ):
                state |= {f"{q}{name}.weight": r(rows, columns, scale=0.1), f"{q}{name}.bias": r(rows)}
        outputs = d if shifts_only else 2 * d
        state |= {p + "proj_out.weight": r(outputs, width, scale=0.02), p + "proj_out.bias": r(outputs)}
    return state


def encode(state, image, label, patch, classes, blocks=3, layers=2):
    """z of one image, token by token and head by head."""
    _, h, w = image.shape
    tokens = [
        image[:, i : i + patch, j : j + patch].reshape(-1) for i in range(0, h, patch) for j in range(0, w, patch)
    ]
    x = torch.stack(tokens)
    n, d = x.shape
    total = 0.0
    for i in range(blocks):
        s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        order = list(range(n)) if i % 2 == 0 else list(range(n))[::-1]
        hidden = x[order] @ s["proj_in.weight"].T + s["proj_in.bias"] + s["pos_embed"][order]
        if classes:
            table = s["class_embed"][:, 0]
            hidden = hidden + (table.mean(0) if label is None else table[label])
        for j in range(layers):
            t = {k.removeprefix(f"attn_blocks.{j}."): v for k, v in s.items() if k.startswith(f"attn_blocks.{j}.")}

            def affine(v, name, t=t):
                return v @ t[name + ".weight"].T + t[name + ".bias"]

            def norm(v, name, t=t):
                centred = v - v.mean(-1, keepdim=True)
                unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                return unit * t[name + ".weight"] + t[name + ".bias"]

            width = hidden.shape[1]
            q, k, v = affine(norm(hidden, "attention.norm"), "attention.qkv").split(width, 1)
            heads = []
            for a in range(0, width, HEAD):
                scores = q[:, a : a + HEAD] @ k[:, a : a + HEAD].T / math.sqrt(HEAD)
                scores = scores.masked_fill(torch.triu(torch.ones(n, n, dtype=torch.bool), 1), -torch.inf)
                heads.append(scores.softmax(1) @ v[:, a : a + HEAD])
            hidden = hidden + affine(torch.cat(heads, 1), "attention.proj")
            inner = affine(norm(hidden, "mlp.norm"), "mlp.main.0")
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            hidden = hidden + affine(inner, "mlp.main.2")
        out = hidden @ s["proj_out.weight"].T + s["proj_out.bias"]
        z = x.clone()
        for place in range(1, n):
            before, here = out[place - 1], order[place]
            alpha, mu = (before[:d], before[d:]) if len(before) == 2 * d else (torch.zeros(d), before)
            z[here] = (x[here] - mu) * torch.exp(-alpha)
            total = total - alpha.sum()
        x = z
    return x, total


@pytest.mark.parametrize(
    ("shape", "patch", "options"),
    [
        ((1, 8, 8), 4, {}),
        ((3, 4, 4), 2, {"classes": 3}),
        ((1, 4, 4), 2, {"width": 128, "shifts_only": True}),
    ],
)
def test_a_state_dict_loads_and_gives_the_same_latents(shape, patch, options):
    state = state_dict(shape, patch, **options)
    flow = load_reference(state, shape)
    assert flow.patch == patch
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    classes = options.get("classes", 0)
    for label in (None, 0, 2) if classes else (None,):
        with torch.no_grad():
            tokens, logdet = flow._encode(images, flow.rows(label, 2))
        for b in range(2):
            z, total = encode(state, images[b], label, patch, classes)
            assert (tokens[b] - z).abs().max() < 1e-10
            assert float(logdet[b]) == pytest.approx(float(total), abs=1e-10)
    assert not any("mask" in key for key in flow.state_dict())


def test_their_prior_variance_is_ours():
    state = state_dict((1, 4, 4), 2, shifts_only=True)
    state["var"] = torch.linspace(0.5, 2.0, 16, dtype=torch.float64).view(4, 4)
    flow = load_reference(state, (1, 4, 4))
    assert torch.allclose(flow.prior_log_variance.exp(), state["var"])


def test_files_are_read_without_running_what_is_in_them(tmp_path):
    from safetensors.torch import save_file

    state = state_dict((1, 4, 4), 2)
    torch.save(state, tmp_path / "flow.pth")
    save_file(state, tmp_path / "flow.safetensors")
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    values = [load_reference(tmp_path / f"flow.{kind}", (1, 4, 4)).log_prob(x) for kind in ("pth", "safetensors")]
    assert torch.equal(values[0], values[1])

    class Trap:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError):
        load_reference(tmp_path / "trap.pth", (1, 4, 4))


def test_what_does_not_fit_is_refused(tmp_path):
    state = state_dict((1, 4, 4), 2)
    with pytest.raises(CheckpointError, match="4 tokens"):
        load_reference(state, (1, 8, 8))
    with pytest.raises(CheckpointError):
        load_reference({k: v for k, v in state.items() if "mlp" not in k}, (1, 4, 4))
    with pytest.raises(CheckpointError):
        load_reference({"weight": torch.zeros(3)}, (1, 4, 4))
    with pytest.raises(CheckpointError, match="no such file"):
        load_reference(tmp_path / "absent.pth", (1, 4, 4))
