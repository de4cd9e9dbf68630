"""`attnopt bench` and the timing beneath it."""

import json
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from dha_models import decoder, ids

import attnopt
from attnopt.benching import Load
from attnopt.cli import bench, main
from attnopt.cli._errors import CommandError
from attnopt.timing import Timing, compare, ratio

pytestmark = pytest.mark.usefixtures("captured_once")
SMALL = ["--tokens", "16", "--new", "4", "--rounds", "7"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    decoder("llama").save_pretrained(root / "source")
    halved = attnopt.optimize(root / "source", {"kv_cache": "50%"}, data=ids(8, 24))
    return root / "source", attnopt.save(halved, root / "halved")


def test_a_model_is_compared_with_its_stock_class(folders, capsys):
    assert main(["bench", str(folders[0]), *SMALL, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["difference"] < 1e-4
    rows = {row["name"]: row for row in document["rows"]}
    assert set(rows) == {
        "prompt",
        "each further token",
        "decoding",
        "cache",
        "peak memory above the weights",
    }
    assert rows["cache"]["a"] == rows["cache"]["b"] == 512
    for name in ("prompt", "each further token", "decoding"):
        gain = rows[name]["gain"]
        assert gain["low"] <= gain["ratio"] <= gain["high"]
        assert rows[name]["a"] > 0


def test_a_missing_package_is_named_with_its_remedy(folders, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", str(folders[0]), *SMALL, "--backend", "ort"]) == 6
    told = "AO603 ONNX export needs onnx, onnxscript, onnxruntime: pip install attnopt[onnx]\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("room", "tokens"), [(None, 512), (4096, 512), (100, 68), (20, 0)])
def test_a_prompt_is_as_long_as_the_model_has_room_for(room, tokens):
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    if room is not None:
        config.get_text_config = lambda decoder: SimpleNamespace(max_position_embeddings=room)
    program, given = (
        SimpleNamespace(config=config, name="It"),
        Namespace(tokens=None, rows=1, new=32),
    )
    if not tokens:
        with pytest.raises(CommandError, match="more than the 20 positions of It"):
            bench.load_for(given, program, Load)
        return
    assert bench.load_for(given, program, Load).tokens == tokens


def test_two_models_are_compared(folders, capsys):
    assert main(["bench", str(folders[1]), str(folders[0]), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "A is better by (95 %)" in shown
    cache = next(line for line in shown.splitlines() if "bytes a token" in line)
    assert cache.split()[-3:] == ["256", "512", "2.00x"]


@pytest.mark.slow
def test_onnxruntime_is_timed(folders, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["bench", str(folders[0]), *SMALL, "--backend", "ort", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["load"]["backend"] == "ort"
    assert document["difference"] < 1e-4
    rows = {row["name"]: row for row in document["rows"]}
    assert rows["cache"]["a"] == rows["cache"]["b"] == 512
    assert rows["prompt"]["gain"]["low"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--rounds", "3"], "at least 7"),
        (["--tokens", "9999"], "more than the"),
        (["--backend", "indutcor"], "did you mean 'inductor'"),
        (["./missing"], "no file or directory"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(flags, words, folders, capsys):
    assert main(["bench", str(folders[0]), *flags]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.strip().splitlines()) == 1


def test_ratios_are_taken_within_rounds():
    """The machine gets ten times slower in between; the ratio does not."""
    slow = [1.0, 10.0] * 10
    timing = Timing({"a": tuple(slow), "b": tuple(2 * s for s in slow)})
    gain = timing.speedup("a", "b")
    assert (gain.low, gain.ratio, gain.high) == (2.0, 2.0, 2.0)
    noisy = ratio([2.0, 1.0, 3.0, 1.5, 2.5, 4.0, 1.0], [1.0] * 7)
    assert noisy.low < noisy.ratio == 2.0 < noisy.high


def test_what_takes_longer_is_found_to():
    calls = {"a": lambda: time.sleep(0.002), "b": lambda: time.sleep(0.006)}
    assert 1.5 < compare(calls, base="b", most=7).speedup("a", "b").ratio < 3.5
