"""quintic plan, as a user would type it."""

import json

import pytest

from quintic.cli.app import main


def quintic(*arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code or 0


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "3"], "does not divide among 3 ranks"),
        (["--ranks", "4", "--shards", "3"], "choose a divisor of 4"),
        (["--mfu", "40"], "--mfu must be in (0, 1]"),
        (["book.txt"], "plan takes settings only"),
    ],
)
def test_mistakes(capsys, arguments, words):
    assert quintic("plan", *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
