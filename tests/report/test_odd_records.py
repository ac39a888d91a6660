"""Pages of run folders that are damaged, or come from elsewhere."""

import pytest
from tests.report.made_run import CONFIG, make_run, page_of, row

from quintic.core import CheckpointError, DataError
from quintic.report import write_report


def test_user_mistakes_say_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent does not exist.*quintic train"):
        write_report(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(DataError, match=r"no metrics yet.*quintic resume"):
        write_report(make_run(tmp_path / "new", []))
    compressed = CONFIG.replace('size = "tiny"', 'size = "compressed"')
    with pytest.raises(DataError, match="was compressed, not trained"):
        write_report(make_run(tmp_path / "smaller", [], config=compressed))
    damaged = make_run(tmp_path / "damaged", [row(1)])
    (damaged / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged.*delete it"):
        write_report(damaged)
    (damaged / "run.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds a list"):
        write_report(damaged)
    (damaged / "run.json").write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        write_report(damaged)
    odd = make_run(tmp_path / "odd", [row(1)], config='task = "lm"\nengine = 3\n')
    with pytest.raises(CheckpointError, match=r"config\.toml is damaged: 'engine' is 3"):
        write_report(odd)
    assert not (damaged / "report.html").exists()


ODD = {
    "loss": ["x", 10**400],
    "val_loss": ["abc", 10**400],
    "lr": [[1]],
    "max_vio": [3, "x", [{}]],
    "expert_load": [5, [1], [["a"]], [[0.5], [0.5, 0.5]]],
    "expert_bias": ["x"],
    "layer_share": [[1]],
    "spectra": [
        3,
        {"a": 1},
        {"a": {"rank": [1], "weight": [1, 2], "shape": [1, 1]}},
        {"a": {"rank": [1], "weight": ["x"], "shape": [1, 1]}},
        {"a": {"rank": [1], "weight": [1.0], "shape": [None, 1]}},
    ],
}


def test_values_of_other_kinds_are_left_out(tmp_path):
    """A row that was damaged or comes from elsewhere; the others make the page."""
    rows = [row(step) for step in range(1, 6)]
    for number, (name, value) in enumerate((name, value) for name, values in ODD.items() for value in values):
        folder = make_run(tmp_path / str(number), [*rows, {**row(6), name: value}])
        assert write_report(folder).exists(), (name, value)


def test_samples_that_lead_out_of_the_folder_are_not_shown(tmp_path):
    folder = make_run(tmp_path / "run", [row(1)], samples={"step-000001.txt": "of the run"})
    (tmp_path / "secret").write_text("precious")
    (folder / "kept").write_text("elsewhere in it")
    try:
        (folder / "samples" / "step-000002.txt").symlink_to(tmp_path / "secret")
        (folder / "samples" / "step-000003.txt").symlink_to("../kept")
        (folder / "samples" / "step-000004.txt").symlink_to("nowhere")
        (tmp_path / "link").symlink_to(folder)
    except OSError:
        pytest.skip("no symbolic links here")
    for given in (folder, tmp_path / "link"):
        page = page_of(given)
        assert "of the run" in page and "elsewhere in it" in page and "precious" not in page
