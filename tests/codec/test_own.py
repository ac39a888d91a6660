import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.codec.capability_probe import network
from tests.codec.test_codec_cli import run
from tests.codec.toys import picture, samples
from tests.diffusion.test_openai import filled

from quintic.codec import Codec, Curve, load_model, psnr, save_foreign, save_model
from quintic.core import CheckpointError, ConfigError, DataError
from quintic.diffusion import NetworkDenoiser
from quintic.diffusion.openai import OpenAIFlags, _UNet


def check(path, size):
    """A codec of a file, twice: what one makes the other reads."""
    codecs = [Codec(denoiser, curve=curve, preset="fast") for denoiser, curve in (load_model(path), load_model(path))]
    original = picture(size, size)
    made = codecs[0].code(original, target_bytes=40)
    assert psnr(made.image, codecs[1].decode(made.data)) == np.inf


def test_a_network_and_its_errors_are_one_file(tmp_path):
    file = tmp_path / "mine.safetensors"
    save_model(network(), samples(8, 16), file)
    read, curve = load_model(file)
    assert isinstance(read, NetworkDenoiser) and curve is None and read.curve.residuals is not None
    assert len(read.curve.levels) == len(Curve.levels())
    check(file, 16)
    with pytest.raises(DataError, match=r"expected images \(n, 1, 16, 16\)"):
        save_model(network(), samples(3, 10), file)
    with pytest.raises(ConfigError, match="save_foreign"):
        save_model(object(), samples(3), file)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A state dict of OpenAI's, and its flags."""
    flags = {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": "1,1",
        "attention_resolutions": "4",
    }
    place = tmp_path_factory.mktemp("openai") / "model.pt"
    torch.save(filled(_UNet(1, 0, OpenAIFlags(**flags))), place)
    return place, flags


def test_foreign_files_are_kept_as_they_are(foreign, tmp_path):
    source, flags = foreign
    file = tmp_path / "mine.safetensors"
    save_foreign(source, samples(4, 8), file, **flags)
    assert load_file(file)["model.pt"].numpy().tobytes() == source.read_bytes()
    check(file, 8)
    told = {"kind": "foreign", "options": "{}", "file": "x.pt"}
    save_file({"../x.pt": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "evil.safetensors", metadata=told)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(tmp_path / "evil.safetensors")
    _, curve = load_model(file)
    told["curve"] = json.dumps(
        {"knots": curve.knots, "residuals": {"sizes": curve.residuals.sizes, "bands": curve.residuals.bands}}
    )
    save_file({"../x.pt": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "evil.safetensors", metadata=told)
    with pytest.raises(CheckpointError, match=r"it names a file '\.\./x\.pt'"):
        load_model(tmp_path / "evil.safetensors")
    assert not (tmp_path.parent / "x.pt").exists()


def test_a_folder_of_diffusers_becomes_one_file(tmp_path):
    pytest.importorskip("diffusers", reason="comes with the extra interop")
    from tests.diffusion.test_diffusers import tiny_pipeline

    tiny_pipeline(tmp_path / "pipeline", channels=1)
    (tmp_path / "pipeline" / "scheduler").rename(tmp_path / "steps")
    file = tmp_path / "mine.safetensors"
    save_foreign(tmp_path / "pipeline", samples(4, 8), file, scheduler=tmp_path / "steps")
    check(file, 8)


def test_the_command_line_makes_a_file_of_a_state_dict(foreign, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    for i in range(3):
        picture(8, 8, seed=i).save(tmp_path / "some" / f"{i}.png")
    source, flags = foreign
    words = [f"{name}={value}" for name, value in flags.items()]
    with pytest.raises(ConfigError, match=r"comes without pictures; name some"):
        run("model", source, *words, "--out", "mine.safetensors")
    with pytest.raises(ConfigError, match="did you mean 'image_size'"):
        run("model", source, "some", "imagesize=8", "--out", "mine.safetensors")
    with pytest.raises(ConfigError, match="image_size=x: expected a whole number"):
        run("model", source, "some", "image_size=x", "--out", "mine.safetensors")
    run("model", source, "some", *words, "--out", "mine.safetensors", "--limit", 2)
    told = capsys.readouterr()
    assert "a model of 8 x 8 pictures, grey, measured on 2" in told.out and "2 pictures only" in told.err
    with pytest.raises(ConfigError, match="exists; --overwrite"):
        run("model", source, "some", *words, "--out", "mine.safetensors")
    run("encode", "some/0.png", "--out", "0.qdc", "--preset", "fast", "--model", "mine.safetensors")
    run("decode", "0.qdc", "--model", "mine.safetensors")
    with pytest.raises(ConfigError, match=r"quintic codec model .*model\.pt PICTURES --out"):
        run("encode", "some/0.png", "--out", "1.qdc", "--model", source)
    network().save(tmp_path / "bare.safetensors")
    with pytest.raises(
        ConfigError, match=r"does not say how large the errors .* quintic codec model bare\.safetensors"
    ):
        run("encode", "some/0.png", "--out", "1.qdc", "--model", "bare.safetensors")
