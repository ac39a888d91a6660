"""``quintic matrix``: reading tables, what is printed, and the picture."""

import json
import shlex
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from quintic.cli.matrix import matrix
from quintic.cli.table_file import read_table
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
        ("country,2001,2002\na,5,6\nb,7,8\n", ["2001", "2002"], ["a", "b"], [[5, 6], [7, 8]]),
        ("2020,2010,2000\n5,6,7\n", ["2020", "2010", "2000"], ["line 2"], [[5, 6, 7]]),
        ("a,2001,2002\nb,2002,2003\n", ["column 2", "column 3"], ["a", "b"], [[2001, 2002], [2002, 2003]]),
        ("a,2001,2001\nb,7,8\n", ["column 2", "column 3"], ["a", "b"], [[2001, 2001], [7, 8]]),
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


def test_whether_there_is_a_header_can_be_said(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("size,10,20\na,5,6\nb,7,9\n", encoding="utf-8")
    assert read_table(path, []).rows == ["size", "a", "b"]
    told = read_table(path, ["20"], header=True)
    assert (told.columns, told.rows, told.values.tolist()) == (["10"], ["a", "b"], [[5.0], [7.0]])
    assert (told.header, told.labels) == (True, "size")
    path.write_text("y,2001,2002\nz,5,6\n", encoding="utf-8")
    assert read_table(path, [], header=False).values.tolist() == [[2001, 2002], [5, 6]]
    run("cur", path, "--rank", 1, "--out", "a.svg")
    assert "names of columns: from the first line; of rows: from the column 'y'" in capsys.readouterr().out
    run("cur", path, "--rank", 1, "--out", "b.svg", "--no-header")
    told = "names of columns: none (--header if the first line has them); of rows: from the column 'column 1'"
    assert told in capsys.readouterr().out
    run("id", path, "--rank", 1, "--out", "c.svg", "--header", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["header"] is True and facts["row_names"] == "y" and facts["shape"] == [1, 2]
    np.save(tmp_path / "t.npy", np.eye(2))
    with pytest.raises(ConfigError, match="a matrix without names; --header is for CSV and TSV"):
        run("cur", tmp_path / "t.npy", "--header")
    run("cur", tmp_path / "t.npy", "--rank", 1, "--out", "d.svg")
    assert "names of" not in capsys.readouterr().out


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
        ("a,b\n1,x\n", "line 2, column 'b': 'x' is not a number; fill it in, or leave the column out with --drop b"),
        ("a,b\n1,\n", "line 2, column 'b': a cell is empty"),
        ("a,b\n1,inf\n", "'inf' is not a finite number"),
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
    with pytest.raises(DataError, match=r"not UTF-8.*expected CSV or TSV.*npy"):
        read_table(tmp_path / "t.csv", [])
    np.savez(tmp_path / "t.npz", np.eye(3))
    with pytest.raises(DataError, match=r"is an archive.*numpy.save"):
        read_table(tmp_path / "t.npz", [])


def test_all_columns_of_text_are_left_out_by_one_command(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("price,built in,its type,heat\n1,1900,house,3\n2,x,flat,4\n,2000,flat,inf\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_table(path, [])
    message = str(caught.value)
    assert "3 columns have cells that are no finite numbers" in message
    assert "'built in' ('x' in line 3), 'its type' ('house' in line 2), 'heat' ('inf' in line 4)" in message
    options = shlex.split(message.split("leave the columns out with ")[1])
    assert options[::2] == ["--drop"] * 3
    with pytest.raises(DataError, match="--drop price"):
        read_table(path, options[1::2])
    assert read_table(path, options[1::2], "drop-rows").values.tolist() == [[1.0], [2.0]]
    wide = write(tmp_path / "wide.csv", [[f"c{j}" for j in range(30)], [1] + ["a"] * 29])
    with pytest.raises(DataError, match=r"in line 2.* and 21 more; .*--drop c1 --drop c2 .*--drop c29$"):
        read_table(wide, [])


def test_missing_cells_are_refused_left_out_or_filled_in_as_asked(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("town,a,b,c d\nP,1,2,3\nQ,,5,6\nR,4,NA,9\nS,7,8,nan\nNA,10,11,12\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_table(path, [])
    assert str(caught.value) == (
        f"{path}, line 3, column 'a': one of 3 cells without a value; --missing drop-rows leaves out 3 of 5 rows, "
        "--missing mean fills in the mean of the column, and --drop a --drop b --drop 'c d' leaves out 3 of 3 columns"
    )
    rows = read_table(path, [], "drop-rows")
    assert rows.rows == ["P", "NA"] and rows.values.tolist() == [[1, 2, 3], [10, 11, 12]]
    assert (rows.missing_cells, rows.rows_left_out) == (3, 3)
    mean = read_table(path, [], "mean")
    assert mean.rows == ["P", "Q", "R", "S", "NA"] and (mean.missing_cells, mean.rows_left_out) == (3, 0)
    expected = [[1, 2, 3], [5.5, 5, 6], [4, 6.5, 9], [7, 8, 7.5], [10, 11, 12]]
    np.testing.assert_allclose(mean.values, expected, rtol=1e-15)
    whole = write(tmp_path / "whole.csv", [["a", "b"], [1, 2]])
    assert read_table(whole, [], "mean").missing_cells == 0
    with pytest.raises(ConfigError, match=r"--missing men: expected .*; did you mean 'mean'"):
        read_table(path, [], "men")


def test_missing_cells_that_leave_nothing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,\n2,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no row is without a missing cell.*--missing mean"):
        read_table(path, [], "drop-rows")
    with pytest.raises(DataError, match="no number to take the mean of; leave out with --drop b"):
        read_table(path, [], "mean")
    path.write_text("a,b\n1e308,1\n1.5e308,2\n,3\n0,-1e-320\n", encoding="utf-8")
    np.testing.assert_allclose(read_table(path, [], "mean").values[2], [1e308 / 3 + 1.5e308 / 3, 3])


def test_what_was_missing_is_told(table, tmp_path, capsys):
    lines = table[0].read_text(encoding="utf-8").splitlines()
    lines[4] = lines[4].rsplit(",", 1)[0] + ","
    gaps = tmp_path / "gaps.csv"
    gaps.write_text("\n".join(lines), encoding="utf-8")
    run("cur", gaps, "--rank", 2, "--missing", "drop-rows")
    out = capsys.readouterr().out
    assert "cells without a value: 1; 1 rows are left out" in out and "11 rows x 4 columns" in out
    run("id", gaps, "--rank", 2, "--missing", "mean", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["missing_cells"], told["rows_left_out"], told["shape"]) == (1, 0, [12, 4])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a;b\n1,5;2\n3;-4,25e1\n", [[1.5, 2], [3, -42.5]]),
        ("a\tb\n1,500\t2,5\n3\t,5\n", [[1.5, 2.5], [3, 0.5]]),
        ("a;b\n0,500;2\n", [[0.5, 2]]),  # no thousands begin with 0
        ("a;b\n1000,500;2\n", [[1000.5, 2]]),
        ("1,5;2,5\n3,25; 4\n", [[1.5, 2.5], [3.25, 4]]),
        ("1,5\t 2,5\t,5\n3\t4\t5\n", [[1.5, 2.5, 0.5], [3, 4, 5]]),
    ],
)
def test_decimal_commas_are_read(tmp_path, text, values):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert read_table(tmp_path / "t.csv", []).values.tolist() == values


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a;b\n1,500;2\n20,250;3\n", "1,500"),  # thousands or decimals?
        ("a;b\n1,5;2.5\n", "1,5"),
        ("a;b\n1.000,5;2\n", "1.000,5"),
        ('a,b\n"1,5",2\n', "1,5"),
        ("1,500;2\n20,250;3\n", "1,500"),
    ],
)
def test_commas_that_may_mean_two_things_are_refused(tmp_path, text, cell):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"'{cell}' is not a number.*write decimals with a point"):
        read_table(tmp_path / "t.csv", [])


@pytest.mark.parametrize("dtype", ["f8", ">f4", "i2", "?", "f2"])
def test_arrays_of_numpy_are_tables(tmp_path, dtype):
    A = np.asfortranarray(np.arange(12).reshape(4, 3) % 7, dtype=dtype)
    np.save(tmp_path / "t.npy", A)
    read = read_table(tmp_path / "t.npy", ["column 2"])
    np.testing.assert_array_equal(read.values, A[:, [0, 2]].astype(float))
    assert read.columns == ["column 1", "column 3"] and read.rows == ["row 1", "row 2", "row 3", "row 4"]
    (tmp_path / "named.dat").write_bytes((tmp_path / "t.npy").read_bytes())
    np.testing.assert_array_equal(read_table(tmp_path / "named.dat", []).values, A.astype(float))


def test_a_matrix_of_numpy_from_the_command(tmp_path, capsys):
    A = np.random.default_rng(0).normal(size=(12, 5))
    np.save(tmp_path / "A.npy", A)
    run("cur", tmp_path / "A.npy", "--rank", 2, "--json")
    told, found = json.loads(capsys.readouterr().out), cur(A, rank=2)
    assert [c["index"] for c in told["columns"]] == found.cols.tolist() and told["error"] == found.error()
    A[3, 1] = np.nan
    np.save(tmp_path / "A.npy", A)
    with pytest.raises(DataError, match=r"row 4, column 'column 2'.*--missing mean"):
        read_table(tmp_path / "A.npy", [])
    assert read_table(tmp_path / "A.npy", [], "drop-rows").rows[3] == "row 5"
    A[5, 2] = np.inf
    np.save(tmp_path / "A.npy", A)
    with pytest.raises(DataError, match=r"row 6, column 3: inf is not a finite number.*--drop 'column 3'"):
        read_table(tmp_path / "A.npy", [], "mean")


@pytest.mark.parametrize(
    "given",
    [
        np.ones(3),
        np.ones((2, 2, 2)),
        np.ones((2, 2)) * 1j,
        np.ones((2, 2)).astype(str),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.float64(3),
    ],
)
def test_arrays_that_are_no_tables(tmp_path, given):
    np.save(tmp_path / "t.npy", given)
    with pytest.raises(DataError, match=r"expected a matrix .rows, columns. of real numbers"):
        read_table(tmp_path / "t.npy", [])


def test_arrays_that_cannot_be_read(tmp_path):
    np.save(tmp_path / "t.npy", np.array([[1, "a"]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "t.npy", [])
    np.save(tmp_path / "t.npy", np.ones((30, 30)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "t.npy").read_bytes()[:500])
    (tmp_path / "head.npy").write_bytes((tmp_path / "t.npy").read_bytes()[:20])
    np.save(tmp_path / "none.npy", np.ones((0, 3)))
    for name in ("cut", "head", "none"):
        with pytest.raises(DataError, match=f"{name}.npy"):
            read_table(tmp_path / f"{name}.npy", [])


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
