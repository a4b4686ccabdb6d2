"""Help: what is usual fits a screen, and everything is a word away."""

import importlib
import re

import pytest

from deblur_deploy.errors import InputError

COMMANDS = {
    "run": ("deblur_deploy.cli.run", "--overwrite", "--max-megapixels"),
    "export": ("deblur_deploy.cli.export", "--prune.macs", "--int8.sensitivity-crops"),
    "train": ("deblur_deploy.cli.train", "--video", "--blur.shot-noise"),
    "bench": ("deblur_deploy.cli.bench", "--tune", "--csv"),
}


def shown(name, word, capsys, monkeypatch):
    module, *_ = COMMANDS[name]
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module).parse([word])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_help_all_has_everything(name, capsys, monkeypatch):
    usual, rare = COMMANDS[name][1:]
    short, whole = (shown(name, word, capsys, monkeypatch) for word in ("--help", "--help-all"))
    assert short.startswith(f"usage: deblur-{name} ")
    assert short.endswith(f"These are the usual options; deblur-{name} --help-all shows every one.\n")
    assert len(short.splitlines()) <= 50
    assert "None" not in short
    assert usual in short
    assert rare not in short
    for option in (usual, rare, *re.findall(r"--[a-z0-9.-]+", short)):
        assert option in whole or option == "--help-all"
    assert shown(name, "-h", capsys, monkeypatch) == short


def test_a_hidden_option_works_and_its_mistakes_are_told(capsys):
    parse = importlib.import_module("deblur_deploy.cli.export").parse
    assert parse(["--out", "x", "--int8.sensitivity-crops", "3"]).recipe.int8.sensitivity_crops == 3
    with pytest.raises(InputError, match="allowed: 0 or more"):
        parse(["--out", "x", "--int8.sensitivity-crops", "-3"])
