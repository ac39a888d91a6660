"""quintic plan, as a user would type it."""

import json

import pytest
from tests.cli.command import quintic


def test_the_plan_of_a_cluster(capsys):
    words = ["plan", "--size", "moonlight-16b-a3b", "--ranks", "64", "--tokens", "5.7e12", "--peak-tflops", "989"]
    assert quintic(*words, "--memory-gib", "16") == 0
    shown = capsys.readouterr().out
    assert "15.29 B" in shown and "2.24 B" in shown and "hours at 40% of 989.00 TFLOP/s" in " ".join(shown.split())
    assert "shorter lm.context" in shown and "micro_batch_size" not in shown
    assert quintic(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 15_960_108_544 and found["advice"] == []
    assert found["hours"] == pytest.approx(5.7e12 * found["flops_per_token"] / (64 * 989e12 * 0.4) / 3600)


def test_the_share_of_the_peak_that_a_run_reached(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("", encoding="utf-8")
    rows = [{"step": i, "mfu": share} for i, share in enumerate([0.01, 0.3, 0.2, None, 0.25], 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert quintic("plan", "--size", "tiny", "--peak-tflops", "1", "--mfu-of", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mfu"] == pytest.approx(0.225)
    assert found["hours"] == pytest.approx(found["tokens"] * found["flops_per_token"] / (1e12 * 0.225) / 3600)
    (tmp_path / "metrics.jsonl").unlink()
    assert quintic("plan", "--mfu-of", str(tmp_path)) == 2
    assert "no step whose share of the peak was measured" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "3"], "does not divide among 3 ranks"),
        (["--ranks", "4", "--shards", "3"], "choose a divisor of 4"),
        (["--mfu", "0.4", "--mfu-of", "runs/a"], "either --mfu or --mfu-of"),
        (["--mfu", "40"], "--mfu must be in (0, 1]"),
        (["book.txt"], "plan takes settings only"),
    ],
)
def test_mistakes(capsys, arguments, words):
    assert quintic("plan", *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
