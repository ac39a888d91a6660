"""Run folders as training leaves them, without the training."""

import json
import math

from quintic.report import write_report

CONFIG = """task = "lm"
size = "tiny"

[optim]
lr = 0.02  # preset tiny
clip_norm = 0.5  # given <by hand>
note = "a # inside"  # default

[engine]
steps = 200  # preset tiny
"""


def row(step, *, moe=True, text=True):
    loss = 3.0 + 4.0 * math.exp(-step / 10) + 0.05 * math.sin(step)
    made = {
        "step": step,
        "loss": loss,
        "lr": 0.02 * min(1.0, step / 10),
        "grad_norm": 0.3 + 2.0 * math.exp(-step / 5),
        "clip_fraction": 0.125,
        "tokens": step * 1000,
        "seconds": step * 0.5,
        "tokens_per_second": 2000.0,
        "optimizer_share": 0.11,
        "mfu": 0.31,
        "something_new": {"ignored": True},
    }
    if text:
        made["bits_per_byte"] = loss / 2
    if moe:
        made |= {"max_vio": [2.0 / step, 1.0 / step], "max_vio_floor": 0.05, "dead_experts": 1}
        if step == 1 or step % 10 == 0:
            made["expert_load"] = [[0.25, 0.5, 0.25, 0.0], [0.25] * 4]
    if step % 50 == 0:
        made["val_loss"] = loss + 0.1
        if text:
            made["val_bits_per_byte"] = (loss + 0.1) / 2
    return made


def make_run(folder, rows, *, config=CONFIG, run=None, machine=None, samples=None, tail=""):
    (folder / "samples").mkdir(parents=True)
    (folder / "config.toml").write_text(config, encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail, encoding="utf-8")
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    if machine is not None:
        (folder / "machine.json").write_text(json.dumps(machine), encoding="utf-8")
    for name, content in (samples or {}).items():
        (folder / "samples" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")
