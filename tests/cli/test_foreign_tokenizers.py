"""Folders whose tokenizer has tokens of its own: what ends and begins a text, chats, and all that belongs to it."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.command import quintic
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from quintic.cli.language import own_tokenizer
from quintic.cli.origin import open_origin
from quintic.cli.wiring import build_settings, open_run
from quintic.data import DataConfig, Tokenizer, prepare
from quintic.lm import LanguageModel, LMConfig, save_deepseek

TEXT = "the whale swam under the ship and the captain looked at the sea.\n" * 12
CHAT = "<|im_start|>user\nthe whale?<|im_end|>\n<|im_start|>assistant\nthe ship.<|im_end|>\n"
TEMPLATE = "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TRAIN = ("--size", "tiny", "engine.steps=2", "engine.sample_every=0", "engine.diagnose_every=0", "engine.batch_size=4")


def folder(path, specials, **config):
    """A DeepSeek-V3 folder with a tokenizer of these special tokens; ``config`` goes into tokenizer_config.json."""
    save_deepseek(LanguageModel(LMConfig(vocab_size=320, context=32, d_model=32), seed=0), path)
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    backend.save(str(path / "tokenizer.json"))
    if config:
        table = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (path / "tokenizer_config.json").write_text(json.dumps(table))
    return path


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    path = tmp_path_factory.mktemp("chatml") / "hf"
    folder(path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bos_token=None, eos_token="<|im_end|>")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"eos_token_id": [2, 0], "pad_token_id": 0, "temperature": 0.3, "do_sample": True}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepseek") / "hf"
    return folder(path, [BEGIN, END, "<｜▁pad▁｜>"], bos_token={"content": BEGIN}, eos_token={"content": END})


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def two(deepseek, tmp_path_factory):
    """Two texts by the tokenizer whose texts have a beginning."""
    path = tmp_path_factory.mktemp("two")
    for name in "ab":
        (path / f"{name}.txt").write_text(TEXT)
    config = DataConfig(tokenizer=str(deepseek / "tokenizer.json"), validation_fraction=0, test_fraction=0)
    return prepare([path], config)


def inherited(origin, *given):
    """Settings of the text of a run that starts from another model."""
    return open_origin(origin, "lm").settings("lm", build_settings("lm", "tiny", given))["data"]


def words(capsys):
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


def test_the_end_and_the_beginning_are_those_that_the_folder_names(deepseek, book, two, tmp_path):
    assert quintic("import", deepseek, "--out", tmp_path / "run") == 0
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert (tokenizer.separator, tokenizer.separator_id, tokenizer.begin_id) == (END, 1, 0)
    assert tokenizer.prompt("the") == [0, *tokenizer.encode("the")] and tokenizer.end_ids == (1,)
    assert quintic("generate", tmp_path / "run", "--prompt", "the whale", "--max-tokens", "3") == 0
    assert quintic("evaluate", tmp_path / "run", book) == 0
    assert two.train.ids[:2].tolist() == [1, 0] and (two.train.ids == 1).sum() == 2


def test_nobody_asks_where_a_text_begins(two):
    """A model need not have learned that one begins behind the end of another."""
    from quintic.lm.task import LanguageModelTask

    task = LanguageModelTask(LMConfig(vocab_size=320, context=two.train.num_tokens), two, cross_documents=False)
    batch = {name: tensor[0] for name, tensor in task.batch(np.arange(1)).items()}
    second = len(batch["ids"]) // 2 + 1
    assert batch["ids"][second - 1 : second + 1].tolist() == [1, 0]
    assert batch["targets"][second - 2 : second].tolist() == [1, -1]
    # The end of the first text belongs to it, the beginning to the second.
    assert batch["documents"][second - 2 : second + 1].tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("tokens", "files", "expected"),
    [
        (["[BOS]", "[EOS]", "<|im_end|>"], {"tokenizer_config.json": {"eos_token": "[EOS]"}}, ("[EOS]", "[EOS]")),
        (["[EOS]", "<|im_end|>"], {"special_tokens_map.json": {"eos_token": {"content": "[EOS]"}}}, ("[EOS]", "[EOS]")),
        (["<s>", "</s>"], {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}, ("</s>", "<s>")),
        (
            ["<s>", "</s>"],
            {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}},
            ("</s>", "</s>"),
        ),
        (
            ["<a>", "<b>"],
            {
                "tokenizer_config.json": {"bos_token": None},
                "special_tokens_map.json": {"bos_token": "<a>", "eos_token": "<b>"},
            },
            ("<b>", "<b>"),
        ),
        (["<a>", "<b>"], {"generation_config.json": {"eos_token_id": [1, 0]}}, ("<b>", "<b>")),
        (["<a>", "<b>"], {"config.json": {"eos_token_id": 1}}, ("<b>", "<b>")),
        (["</s>"], {"config.json": {"eos_token_id": 5}}, ("</s>", "</s>")),  # no special token: a class's default
    ],
)  # fmt: skip
def test_where_the_end_of_a_text_is_written(tmp_path, tokens, files, expected):
    backend = HFTokenizer(models.BPE(vocab={token: i for i, token in enumerate([*tokens, *"abcdef"])}, merges=[]))
    backend.add_special_tokens(tokens)
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if "config.json" not in files:
        (tmp_path / "config.json").write_text("// of another program, and not asked")
    found = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (found.separator, backend.id_to_token(found.begin_id)) == expected


def test_what_nothing_says_can_be_said(deepseek, book, tmp_path, capsys):
    hf = shutil.copytree(deepseek, tmp_path / "hf")
    (hf / "tokenizer_config.json").unlink()
    for verb in (("import", hf), ("train", book, *TRAIN, "--from", hf)):
        assert quintic(*verb, "--out", tmp_path / "run") == 2
        assert "has no token to separate documents with" in (shown := words(capsys)) and "data.separator=TOKEN" in shown
    assert not (tmp_path / "run").exists()
    assert quintic("import", hf, "--out", tmp_path / "run", f"data.separator={END}") == 0
    assert quintic("generate", tmp_path / "run", "--max-tokens", "3") == 0
    assert inherited(tmp_path / "run").separator == END
    assert quintic("import", hf, "--out", tmp_path / "x", "data.separator=nowhere") == 2
    assert "has no token 'nowhere', which data.separator names" in words(capsys)
    assert quintic("train", book, *TRAIN, "data.separator=x", "--out", tmp_path / "x") == 2
    assert "is for a tokenizer.json" in words(capsys)


def test_two_ends_of_a_text_are_not_chosen_from(tmp_path, capsys):
    hf = folder(tmp_path / "hf", ["[EOS]", "<|im_end|>"])
    assert quintic("import", hf, "--out", tmp_path / "run") == 2
    assert "several tokens to separate documents with (<|im_end|>, [EOS]), and no file beside it says" in words(capsys)


def test_all_that_belongs_to_a_tokenizer_comes_back(chatml, book, tmp_path):
    hf = shutil.copytree(chatml, tmp_path / "hf")
    table = json.loads((hf / "tokenizer_config.json").read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}
    (hf / "tokenizer_config.json").write_text(json.dumps(table))
    run, again = tmp_path / "run", tmp_path / "again"
    assert quintic("import", hf, "--out", tmp_path / "imported") == 0
    shutil.rmtree(hf)
    assert quintic("train", book, *TRAIN, "--from", tmp_path / "imported", "--out", run) == 0
    assert quintic("export", run, again) == 0
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (again / name).read_bytes() == (chatml / name).read_bytes()
    old, new = (Tokenizer.load(path / "tokenizer.json") for path in (chatml, again))
    assert old.hash == new.hash and new.end_ids == (2, 0)
    config = json.loads((again / "tokenizer_config.json").read_text())
    assert config == json.loads((chatml / "tokenizer_config.json").read_text())  # without files that are not there
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == [2, 0]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    assert (theirs.eos_token, theirs.bos_token) == ("<|im_end|>", None)
    messages = [{"role": "user", "content": "the whale?"}, {"role": "assistant", "content": "the ship."}]
    assert theirs.apply_chat_template(messages, tokenize=False) == CHAT


def test_text_that_spells_special_tokens_is_text_or_tokens(chatml, tmp_path):
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"text": CHAT}) + "\n" for _ in range(30)))
    found = {}
    for how in ("text", "token"):
        config = DataConfig(tokenizer=str(chatml / "tokenizer.json"), special_tokens=how)
        found[how] = prepare([tmp_path / "chat.jsonl"], config)
    assert found["text"].fingerprint != found["token"].fingerprint
    assert "(<|im_start|>, <|im_end|>), which are read as text; data.special" in " ".join(found["text"].warnings)
    assert not found["token"].warnings
    begins = [int((found[how].train.ids == 1).sum()) for how in ("text", "token")]
    assert begins == [0, 54]
    backend = HFTokenizer.from_file(str(chatml / "tokenizer.json"))
    assert found["token"].train.ids[: 1 + len(expected := backend.encode(CHAT).ids)].tolist() == [2, *expected]
    assert found["token"].tokenizer.prompt(CHAT)[1:] == expected
    assert found["token"].tokenizer.decode([1, *backend.encode("user").ids, 2]) == "<|im_start|>user"
    # A run reads prompts as its text, and so does one that starts from it, unless it is told otherwise.
    run = tmp_path / "run"
    assert quintic("import", chatml, "--out", run, "data.special_tokens=token") == 0
    _, settings, _ = open_run(run)
    assert own_tokenizer(run, settings).prompt(CHAT)[1:] == expected
    assert inherited(run).special_tokens == "token"
    assert inherited(run, "data.special_tokens=text").special_tokens == "text"


def test_documents_that_have_their_tokens_written_out_get_none_twice(deepseek, tmp_path):
    lines = [f"{BEGIN}the whale {i}{END}" for i in range(30)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = DataConfig(
        tokenizer=str(deepseek / "tokenizer.json"), special_tokens="token", validation_fraction=0, test_fraction=0
    )
    data = prepare([tmp_path / "chat.jsonl"], config)
    ids = data.train.ids.tolist()
    assert (ids[:2], ids[-1]) == ([1, 0], 1) and ids.count(0) == 30 and ids.count(1) == 31
    assert data.tokenizer.prompt(lines[0]) == data.tokenizer.encode(lines[0])


def test_a_run_keeps_its_tokenizer_when_its_origin_is_gone(deepseek, book, tmp_path):
    hf = shutil.copytree(deepseek, tmp_path / "hf")
    run = tmp_path / "run"
    assert quintic("train", book, *TRAIN, "engine.checkpoint_every=1", "--from", hf, "--out", run) == 0
    shutil.rmtree(hf)
    assert open_run(run)[1]["data"].tokenizer == str(run / "tokenizer.json")
    assert quintic("evaluate", run) == 0
    shutil.rmtree(run / "checkpoints" / "step-2")
    moved = run.rename(tmp_path / "moved")
    assert quintic("resume", moved) == 0


@pytest.mark.parametrize("given", ["byte", "bpe", "FILE"])
def test_a_tokenizer_of_other_ids_is_refused(chatml, deepseek, book, tmp_path, given, capsys):
    named = f"data.tokenizer={given}".replace("FILE", str(deepseek / "tokenizer.json"))
    assert quintic("train", book, *TRAIN, "--from", chatml, named, "--out", tmp_path / "run") == 2
    assert "is not the tokenizer that the model of" in words(capsys) and not (tmp_path / "run").exists()
    same = shutil.copy(chatml / "tokenizer.json", tmp_path / "same.json")
    found = inherited(chatml, f"data.tokenizer={same}")
    assert (found.tokenizer, found.separator) == (str(same), "<|im_end|>")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def give_an_id(hf, number):
    content = json.loads((hf / "tokenizer.json").read_text())
    content["model"]["vocab"]["z"] = number
    (hf / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda hf: (hf / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
        (lambda hf: (hf / "tokenizer.json").write_bytes(b"\0"), "is not a tokenizer.json"),
        (lambda hf: give_an_id(hf, 320), "up to 320, its model has 320"),
        (lambda hf: give_an_id(hf, 4 * 10**9), "ids up to 4000000000"),
        (lambda hf: (hf / "tokenizer_config.json").write_text("[" * 200_000), "tokenizer_config.json is not JSON"),
        (lambda hf: (hf / "tokenizer_config.json").write_text("[1]"), "expected a JSON object"),
        (lambda hf: (hf / "special_tokens_map.json").write_bytes(b"\xff"), "special_tokens_map.json cannot be read"),
        (lambda hf: edit(hf / "tokenizer_config.json", eos_token="x?"), "no token 'x?', which tokenizer_"),
    ],
)  # fmt: skip
def test_an_import_that_could_not_be_used_makes_nothing(deepseek, tmp_path, change, found, capsys):
    hf = shutil.copytree(deepseek, tmp_path / "hf")
    change(hf)
    assert quintic("import", hf, "--out", tmp_path / "run") == 2
    assert found in (shown := words(capsys)) and "ready" not in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [(lambda t: t.to(torch.int8), "of type I8"), (lambda t: t * float("nan"), "not finite")],
)
def test_weights_that_are_no_numbers_are_refused(deepseek, tmp_path, change, found, capsys):
    hf = shutil.copytree(deepseek, tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({**weights, name: change(weights[name])}, hf / "model.safetensors")
    assert quintic("import", hf, "--out", tmp_path / "run") == 2
    assert found in (shown := words(capsys)) and name in shown
    assert not (tmp_path / "run").exists()
