"""The figure of spectra shows the records, and only where there are some."""

import re
from pathlib import Path

import numpy as np

from quintic.report.records import Records
from quintic.report.spectra import spectra_figure


def records(spectra_by_step):
    rows = [{"step": step, "loss": 1.0, **({"spectra": s} if s else {})} for step, s in spectra_by_step.items()]
    return Records(Path("run"), rows, {}, "", {}, {}, [])


def matrix(weight, update):
    return {"shape": [8, 4], "rank": list(range(1, len(weight) + 1)), "weight": weight, "update": update}


def paths(body, kind):
    return re.findall(rf'<path class="{kind}"[^>]* d="([^"]*)"', body)


def test_lines_are_weights_by_step_and_dots_the_last_update():
    found = spectra_figure(
        records({1: {"a": matrix([1.0, 0.1], [0.5, 0.4])}, 2: None, 9: {"a": matrix([10.0, 1.0], [1.0, 1.0])}})
    )
    assert found is not None
    assert len(paths(found.body, "line")) == 2 and len(paths(found.body, "dots")) == 1
    heights = [[int(y) for y in re.findall(r"[ML]\d+ (\d+)", d)] for d in paths(found.body, "line")]
    # The axis is logarithmic from 0.1 to 10: the first matrix goes from its middle to its foot, the last from the top.
    assert heights == [[5000, 10_000], [0, 5000]]
    assert set(re.findall(r"M\d+ (\d+)h0", paths(found.body, "dots")[0])) == {"5000"}
    assert "step 1" in found.body and "step 9" in found.body and ">rank<" in found.body
    assert (
        'aria-label="Singular values of a, 8 by 4, logarithmic; the largest of the weights is 10 at step 9"'
        in found.body
    )


def test_at_most_five_lines_of_a_long_run():
    spectra = {step: {"a": matrix([1.0 + step, 1.0], None)} for step in range(1, 40)}
    found = spectra_figure(records(spectra))
    assert found is not None
    assert len(paths(found.body, "line")) == 5 and not paths(found.body, "dots")


def test_zeros_and_nulls_are_left_out():
    found = spectra_figure(records({1: {"a": matrix([2.0, None, 0.0], None), "b": matrix([0.0, 0.0], None)}}))
    assert found is not None
    assert found.body.count('role="img"') == 1  # b has nothing a logarithmic axis can show
    assert spectra_figure(records({1: {"b": matrix([0.0], [None])}})) is None
    assert spectra_figure(records({1: None})) is None


def test_a_matrix_that_came_late_is_drawn_from_there():
    found = spectra_figure(
        records({1: {"a": matrix([1.0], None)}, 2: {"a": matrix([1.0], None), "b": matrix([3.0], None)}})
    )
    assert found is not None and found.body.count('role="img"') == 2
    assert np.isfinite(len(found.caption))


def test_names_are_text():
    found = spectra_figure(records({1: {"<b>": matrix([1.0, 0.5], None)}}))
    assert found is not None and "<b>" not in found.body


def test_a_real_diagnosis_is_drawn():
    import torch
    from torch import nn

    from quintic.optim import Muon, diagnose, snapshot

    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = Muon(list(model.parameters()), lr=0.1)
    model(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    before = snapshot(optimizer)
    optimizer.step()
    found = spectra_figure(records({1: diagnose(model, optimizer, before).spectra}))
    assert found is not None and found.body.count('role="img"') == 2
