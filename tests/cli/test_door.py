"""The door: help with examples, exit codes, JSON, pipes, colours, completion; and no traceback for a user."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from tests.cli.command import quintic

from quintic.cli.app import EXIT_CODES, app

SMALL = ["--size", "tiny", "engine.steps=2", "lm.num_layers=2"]
TEXT = "the whale swam under the ship and the captain looked at the sea.\n" * 40


def verbs(commands=app, before=()):
    """Every verb with the words that call it."""
    found = {}
    for name in commands:
        if not name.startswith("-"):
            words = (*before, name)
            if commands[name].default_command is not None:
                found[words] = commands[name]
            found |= verbs(commands[name], words)
    return found


def process(*arguments, **options):
    settings = {"env": {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}}
    return subprocess.Popen([sys.executable, "-m", "quintic", *map(str, arguments)], **settings, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    assert quintic("train", folder / "book.txt", *SMALL, "--out", folder / "run") == 0
    return folder / "run"


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_torchrun_takes_none_of_our_options_for_one_of_its_own(verb):
    """Its parser looks at all words, and knows options by their beginnings."""
    from torch.distributed.run import get_args_parser

    options = [name for argument in app[verb].assemble_argument_collection() for name in argument.names]
    options = [name for name in options if name.startswith("-")]
    assert len(options) > 4 and "--log" not in options
    for name in options:
        words = ["-m", "quintic", verb, "book.txt", name, "word"]
        parsed = get_args_parser().parse_args(["--nproc-per-node", "2", *words])
        assert [parsed.training_script, *parsed.training_script_args] == words[1:]


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_help_of_every_verb_shows_examples_that_parse(words, capsys):
    assert quintic(*words, "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("\n", " ").split())
    assert f"Usage: quintic {' '.join(words)}" in shown
    examples = re.findall(r"^\s*(quintic .*|torchrun .*)$", verbs()[words].default_command.__doc__, re.M)
    assert examples and any(example.startswith(f"quintic {' '.join(words)}") for example in examples)
    for example in examples:
        assert " ".join(example.split()) in shown
        tokens = shlex.split(example.split("-m quintic ")[-1].removeprefix("quintic "))
        app.parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_help_fills_a_terminal_of_80_columns_and_no_more(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert quintic(*words, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line for line in lines if line.startswith(("  quintic ", "  torchrun "))]
    examples = re.findall(r"^\s*(quintic .*|torchrun .*)$", verbs()[words].default_command.__doc__, re.M)
    assert [line.strip() for line in shown] == examples  # none is broken
    for line, following in pairwise(lines):  # where a description goes on, its next word had no room
        if line.startswith("│") and following.startswith("│      "):
            words_of, next_words = line.strip("│"), following.strip("│ ").split()
            room = len(words_of) - len(words_of.rstrip()) - 1
            assert words_of.strip() == "" or len(next_words[0]) + 1 > room, line


def test_help_names_every_verb_and_every_exit_code(capsys):
    assert quintic("--help") == 0
    shown = capsys.readouterr().out
    for words in verbs():
        assert re.search(rf"│ {words[0]} ", shown), words
    for code in EXIT_CODES:
        assert re.search(rf"^ +{code}  ", shown, re.M), code


def test_exit_code_1_where_training_cannot_go_on(run, tmp_path, capsys):
    book = run.parent / "book.txt"
    assert quintic("train", book, *SMALL, "engine.steps=9", "optim.lr=1e30", "--out", tmp_path / "wild") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "stopped: " in told and "What was saved before is intact" in told  # there is no checkpoint yet


def test_exit_code_2_for_what_a_user_can_mend(capsys):
    for arguments in (["trian"], ["train", "--sizee", "tiny"], ["report"], ["report", "nowhere"]):
        assert quintic(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.err and not captured.out, arguments


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_exit_code_130_after_ctrl_c(run):
    # More than a minute of text, which does not end by itself: the likeliest token goes round and round.
    endless = ["--max-tokens", 10**6, "--temperature", 0, "--prompt", "the the the"]
    asked = process(
        "generate", run, *endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert asked.stdout.read(1)
    time.sleep(0.2)
    asked.send_signal(signal.SIGINT)
    _, errors = asked.communicate(timeout=60)
    assert asked.returncode == 130 and errors.decode().split("; ")[0].strip() == "interrupted"


def test_ctrl_c_while_the_command_is_still_being_imported():
    program = (
        "import sys; from quintic.__main__ import main\n"
        "class Hurried:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'quintic.cli.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Hurried()); main()"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (130, "")


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["codec", "encode", "--help"], ["roles", "--size", "tiny"], ["generate", "RUN"]]
)
def test_exit_code_141_when_the_reader_goes_away(run, arguments):
    arguments = [run if word == "RUN" else word for word in arguments]
    told = process(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    told.stdout.close()  # as head does when it has seen enough
    errors = told.stderr.read()
    assert told.wait(60) == 141 and errors == b""


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
def test_a_full_disk_and_an_output_that_is_closed(run):
    words = shlex.join([sys.executable, "-m", "quintic", "generate", str(run), "--max-tokens", "3"])
    told = subprocess.run(["sh", "-c", f"{words} >&-"], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    if os.path.exists("/dev/full"):
        told = subprocess.run(["sh", "-c", f"{words} >/dev/full"], capture_output=True, text=True)
        assert told.returncode == 2
        assert " ".join(told.stderr.split()) == "error: No space left on device; what was saved before is intact"


def test_json_where_a_script_wants_it(run, tmp_path, capsys):
    def asked(*arguments):
        assert quintic(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    found = asked("doctor")
    assert found["versions"]["torch"] and found["matmul_gflops"] > 0 and found["cpu_count"] >= 1
    assert found["cache"]["folder"] == os.environ["QUINTIC_CACHE"] and found["cache"]["bytes"] > 0
    rows = asked("roles", "--size", "tiny")
    (row,) = [row for row in rows if row["name"] == "embedding.weight"]
    assert (row["shape"], row["role"], row["algorithm"]) == ([264, 64], "embedding", "adamw")
    assert asked("plan", "--size", "tiny")["tokens_per_step"] > 100
    found = asked("evaluate", run, run.parent / "book.txt")
    assert found["run"] == str(run) and found["bits_per_byte"] > 0 and found["loss"] > 0
    found = asked("verify-resume", run, "--steps", "2", "--cut", "1")
    assert found["exact"] is True and found["differences"] == [] and found["tensors"] > 10


def test_doctor_says_what_there_is_and_how_to_clear_the_cache(capsys):
    assert quintic("doctor") == 0
    shown = capsys.readouterr().out
    for word in ("quintic", "torch", "tensorboard", "cores", "memory", "instructions", "matrix product", "GFLOP/s"):
        assert re.search(rf"^.*{word}", shown, re.M), word
    (command,) = re.findall("safe to delete: (.*)", shown)
    assert os.environ["QUINTIC_CACHE"] in command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "RUN", "--prompt", "a\udcff"], "--prompt is not UTF-8 text"),
        (["generate", "RUN", "--class", "3"], "--class has no meaning for a run of task lm"),
        (["generate", "ddpm/fashion28", "--n", "100000000"], "--n must be 1 to 10,000"),
        (["plan", "--ranks", "0"], "--ranks must be at least 1, found 0"),
        (["plan", "--tokens", "-1"], "--tokens must be 0 or more, found -1"),
        (["race", "BOOK", "--out", "OUT", "--lr", "0"], "--lr must be above 0, found 0"),
        (["race", "BOOK", "--out", "OUT", *SMALL, "--lr", "0.01", "--seeds", "1", "data.validation_fraction=0"],
         "keep data.validation_fraction above 0"),
        (["codec", "encode", "x.png", "--target-bytes", "-5"], "a file has at least 1 byte, found -5"),
        (["codec", "eval", "x.png", "--limit", "0"], "--limit must be at least 1"),
        (["resume", "FOREIGN"], "lacks 'task'"),
        (["verify-resume", "FOREIGN"], "lacks 'task'"),
        (["report", "FILE/x"], "does not exist"),
        (["export", "RUN", "FILE/x"], "file is a file, expected a folder; choose another --out"),
        (["matrix", "cur", "nowhere.csv", "--rank", "2"], "error: nowhere.csv: No such file or directory"),
    ],
)  # fmt: skip
def test_mistakes_get_a_line_and_no_traceback(run, tmp_path, capsys, arguments, message):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.toml").write_text("", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    places = {"RUN": run, "BOOK": run.parent / "book.txt", "OUT": tmp_path / "out", "FOREIGN": tmp_path / "foreign"}
    arguments = [str(places.get(word, word)).replace("FILE", str(tmp_path / "file")) for word in arguments]
    assert quintic(*arguments) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert message in errors and "Traceback" not in errors


@pytest.mark.parametrize("size", ["tiny", "laptop"])
@pytest.mark.parametrize("task", ["lm", "tarflow", "ddpm"])
def test_roles_of_every_task(task, size, capsys):
    """Also of a flow whose guidance wants classes, of which nothing is known without images."""
    assert quintic("roles", "--task", task, "--size", size) == 0
    assert re.search(r"total: [\d,]+ parameters, .* under Muon", capsys.readouterr().out)


def test_a_terminal_that_cannot_show_a_letter_gets_a_question_mark(run):
    told = process("generate", run, "--prompt", "Ahab \u2014 the", "--max-tokens", 3, stdout=subprocess.PIPE,
                   stderr=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})  # fmt: skip
    output, errors = told.communicate(timeout=60)
    assert told.returncode == 0 and output.startswith(b"Ahab ? the") and not errors


def in_terminal(*arguments, **environment):
    """What a command writes to a terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    started = subprocess.Popen(
        [sys.executable, "-m", "quintic", *arguments], stdout=theirs, stderr=theirs, stdin=theirs,
        env={**clean, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    started.wait(60)
    return written.decode()


def test_colours_are_for_terminals_and_can_be_refused(capsys):
    colour = re.compile(r"\x1b\[[\d;]*3[0-8][\d;]*m")
    assert colour.search(in_terminal("report", "nowhere"))
    assert not colour.search(in_terminal("report", "nowhere", NO_COLOR="1"))
    assert quintic("report", "nowhere") == 2 and quintic("--help") == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err + captured.out


def test_names_of_settings_are_whole_in_a_narrow_window(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert quintic("train", "--settings", "--size", "tiny") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^engine\.micro_batch_size +0 ", shown, re.M) and "``" not in shown
    assert max(map(len, shown.splitlines())) <= 40


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ver", {"verify-resume"}),
        ("train bo", {"book.txt"}),
        ("train --se", {"--seed", "--settings"}),
        ("codec encode --target-b", {"--target-bytes"}),
        ("codec encode bo", {"book.txt"}),
        ("race bo", {"book.txt"}),
        ("generate bo", {"book.txt"}),
        ("evaluate bo", {"book.txt"}),
    ],
)
def test_what_bash_offers(line, words, tmp_path):
    (tmp_path / "book.txt").touch()
    script = f"""
        eval "$1"; set -- quintic {line}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${{#COMP_LINE}}
        _quintic; printf '%s\n' "${{COMPREPLY[@]}}"
    """
    told = subprocess.run(["bash", "-c", script, "bash", app.generate_completion(shell="bash")], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert set(told.stdout.split()) == words, told.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_verbs_and_options(shell, tmp_path):
    script = app.generate_completion(shell=shell)
    for word in ("verify-resume", "generate", "codec", "target-bytes", "max-tokens"):
        assert word in script, word
    home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "share"), "SHELL": f"/bin/{shell}"}
    told = process("--install-completion", "--shell", shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=home)
    output, _ = told.communicate(timeout=60)
    assert told.returncode == 0, output
    assert any("quintic" in path.name for path in tmp_path.rglob("*"))
