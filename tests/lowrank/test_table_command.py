"""``quintic matrix``: reading tables, what is printed, and the picture."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from quintic.cli.matrix import matrix, read_table
from quintic.core import ConfigError, DataError
from quintic.lowrank import cur, interpolative


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments):
    matrix(list(map(str, arguments)), result_action="return_value")


def write(path, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path):
    """Twelve rows of four columns, the last of which is the sum of the first two."""
    A = np.random.default_rng(0).normal(size=(12, 3))
    A = np.column_stack([A, A[:, 0] + A[:, 1]])
    rows = [["place", "heat", "rain", "wind", "both [x]"], *([f"p{i}", *row] for i, row in enumerate(A))]
    return write(tmp_path / "weather.csv", rows), A


def test_names_are_recognised(table, tmp_path):
    read = read_table(table[0], [])
    assert read.columns == ["heat", "rain", "wind", "both [x]"] and read.rows[3] == "p3"
    np.testing.assert_array_equal(read.values, table[1])
    bare = read_table(write(tmp_path / "bare.csv", [[1, 2], [3, 4]]), [])
    assert bare.columns == ["column 1", "column 2"] and bare.rows == ["line 1", "line 2"]
    assert read_table(write(tmp_path / "head.csv", [["a", "b"], [3, 4]]), []).rows == ["line 2"]
    (tmp_path / "tabs.tsv").write_text("\ufeffx\ty\r\n1,5\t2\r\n".replace("1,5", "1.5"), encoding="utf-8")
    assert read_table(tmp_path / "tabs.tsv", []).values.tolist() == [[1.5, 2.0]]
    (tmp_path / "semi.csv").write_text('"a;b";c\n"r,1";2\n', encoding="utf-8")
    assert read_table(tmp_path / "semi.csv", []).columns == ["c"]


@pytest.mark.parametrize(
    ("text", "columns", "rows", "values"),
    [
        (",0,1\n0,5,6\n1,7,8\n", ["0", "1"], ["0", "1"], [[5, 6], [7, 8]]),  # a data frame of pandas
        (",a,b\n0,5,6\n1,7,8\n", ["a", "b"], ["0", "1"], [[5, 6], [7, 8]]),
        ('"","a"\n"1",5\n', ["a"], ["1"], [[5]]),  # R
        ("id,2001,2002\n1,5,6\n2,7,8\n", ["id", "2001", "2002"], ["line 2", "line 3"], [[1, 5, 6], [2, 7, 8]]),
        ("p,1,2\nq,3,4\n", ["column 2", "column 3"], ["p", "q"], [[1, 2], [3, 4]]),
        ("code,a\n7,1\nA8,2\nB9,3\n", ["a"], ["7", "A8", "B9"], [[1], [2], [3]]),
        ('\r\n \r\n"x, y, z";b;c\r\n1;2;3\r\n', ["x, y, z", "b", "c"], ["line 4"], [[1, 2, 3]]),
        ('n,"two\nlines"\n"p\nq",1\nr\u2028s,2\n', ["two\nlines"], ["p\nq", "r\u2028s"], [[1], [2]]),
    ],
)
def test_names_and_numbers_are_told_apart(tmp_path, text, columns, rows, values):
    (tmp_path / "t.csv").write_bytes(text.encode())
    read = read_table(tmp_path / "t.csv", [])
    assert (read.columns, read.rows, read.values.tolist()) == (columns, rows, values)


def test_columns_are_left_out_by_name(table):
    read = read_table(table[0], ["rain"])
    assert read.columns == ["heat", "wind", "both [x]"]
    assert read_table(table[0], ["place"]).rows[0] == "line 2"
    with pytest.raises(ConfigError, match="no column 'rian' to leave out; did you mean 'rain'"):
        read_table(table[0], ["rian"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "no numbers"),
        ("a,b\n1,2\n3\n", "line 3 has 1 cells, expected 2"),
        ("a,b\n1,x\n", "line 2, column 'b': 'x' is not a number; fill it in, or leave the column out with --drop 'b'"),
        ("a,b\n1,\n", "a cell is empty"),
        ("a,b\n1,nan\n", "'nan' is not a finite number"),
        ("a,b\n1,1e400\n", "'1e400' is not a finite number"),
        ("a,b\n1,1_000\n", "'1_000' is not a number"),
        ("a,b\n1,2\n,4\n5,6\n", "line 3, column 'a': a cell is empty"),
        ("a,b\n1,2\n10%,4\n5,6\n", "line 3, column 'a': '10%' is not a number"),
        ('a,"b\nc"\n1,2\n"\n3",x\n', "line 4, column 'b\\\\nc': 'x'"),
        ('a,b\n1,"' + 200_000 * "x", "line 2 cannot be read: field larger than field limit"),
        ("name\nx\n", "column 'name': 'x'"),
    ],
)
def test_what_is_no_table_is_said_with_its_place(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.csv", [])


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_table(tmp_path / "t.csv", [])


def test_cur_names_the_rows_and_columns(table, tmp_path, capsys):
    path, A = table
    run("cur", path, "--rank", 2)
    out = capsys.readouterr().out
    found = cur(A, rank=2)
    names = ["heat", "rain", "wind", "both [x]"]
    assert "weather.csv: 12 rows x 4 columns; rank 2 explains" in out
    assert f"relative error {found.error():.3g}" in out
    for j in found.cols:
        assert f"\n{names[j]} " in out
    for i in found.rows:
        assert f"\np{i} " in out
    picture = ET.fromstring((tmp_path / "weather-cur.svg").read_text(encoding="utf-8"))
    texts = {e.text for e in picture.iter() if e.tag.endswith("text")}
    assert {names[j] for j in found.cols} | {f"p{i}" for i in found.rows} <= texts
    assert len([e for e in picture.iter() if e.tag.endswith("image")]) == 2


def test_id_shows_that_a_column_is_the_sum_of_others(table, capsys):
    path, A = table
    run("id", path, "--tol", 1e-8, "--out", "here.svg")
    out = capsys.readouterr().out
    assert "rank 3" in out and "picture: here.svg" in out
    found = interpolative(A, tol=1e-8)
    names = ["heat", "rain", "wind", "both [x]"]
    (rest,) = set(range(4)) - set(found.cols.tolist())
    line = next(row for row in out.splitlines() if row.startswith(f"{names[rest]} ~"))
    assert "wind" not in line and line.count("1 ") == 2


def test_id_of_rows_and_scaled_columns(table, capsys):
    path, A = table
    run("id", path, "--rank", 2, "--side", "rows", "--scale")
    out = capsys.readouterr().out
    found = interpolative(A / np.sqrt((A**2).mean(0)), rank=2, side="rows")
    assert all(f"\np{i} " in out for i in found.rows)


def test_json_has_what_was_chosen(table, tmp_path, capsys):
    path, A = table
    run("cur", path, "--rank", 2, "--json")
    told, found = json.loads(capsys.readouterr().out), cur(A, rank=2)
    names = ["heat", "rain", "wind", "both [x]"]
    assert [(c["index"], c["name"]) for c in told["columns"]] == [(j, names[j]) for j in found.cols]
    assert [(r["index"], r["name"]) for r in told["rows"]] == [(i, f"p{i}") for i in found.rows]
    assert told["shape"] == [12, 4] and told["error"] == found.error() >= told["least_error"] > 0
    s = np.linalg.svd(A, compute_uv=False)
    assert told["least_error"] == pytest.approx(np.sqrt((s[2:] ** 2).sum() / (s**2).sum()))
    q, _ = np.linalg.qr(A[:, found.cols])
    left = np.linalg.norm(A - q @ (q.T @ A)) / np.linalg.norm(A)
    assert told["columns"][-1]["error"] == pytest.approx(left)
    assert told["picture"] == "weather-cur.svg" and (tmp_path / told["picture"]).exists()
    run("id", path, "--rank", 2, "--side", "rows", "--json")
    told = json.loads(capsys.readouterr().out)
    assert [r["index"] for r in told["rows"]] == interpolative(A, rank=2, side="rows").rows.tolist()
    assert "columns" not in told


def test_large_tables_and_long_lists_stay_readable(tmp_path, capsys):
    A = np.random.default_rng(0).normal(size=(900, 50))
    run("cur", write(tmp_path / "large.csv", A), "--rank", 30)
    assert capsys.readouterr().out.count("and 10 more") == 2
    assert len((tmp_path / "large-cur.svg").read_bytes()) < 200_000


def test_a_table_of_zeros(tmp_path, capsys):
    run("cur", write(tmp_path / "zero.csv", [[0, 0], [0, 0]]))
    assert "relative error 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "5"], "expected 1 to 4"),
        (["--rank", "2", "--tol", "0.1"], "exclude each other"),
        (["--method", "qualty"], "did you mean 'quality'"),
        (["--out", "picture.png"], "ends in .svg"),
    ],
)
def test_mistakes_are_named(table, arguments, message):
    with pytest.raises(ConfigError, match=message):
        run("cur", table[0], *arguments)
