"""Mistakes at the command line: one line that says what and where, and a stable status."""

import json
import struct
import time
from pathlib import Path

import pytest

from attnopt.cli import Exit, main
from attnopt.cli._wanted import kept

CONFIG = '{"model_type": "llama"}'
COMMANDS = (
    "bench, diff, doctor, explain, export, generate, heal, inspect, optimize, passes, plan, "
    "recipes, verify"
)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def safetensors(promised: int, present: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [promised], "data_offsets": [0, promised]}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(present)


def checkpoint(folder: Path, **files: str | bytes) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in {"config_json": CONFIG, **files}.items():
        path = folder / name.replace("_", ".").replace("pytorch.model", "pytorch_model")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def test_help_lists_every_command_and_their_flags(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "--help")
    commands = [
        line.split()[0] for line in out.split("commands:\n")[1].split("\n\n")[0].split("\n")
    ]
    assert (status, commands) == (0, COMMANDS.split(", "))
    assert max(map(len, out.splitlines())) <= 100
    for command in commands:
        status, out, _ = run(capsys, command, "--help")
        assert status == 0
        assert max(map(len, out.splitlines())) <= 100
        assert {"--json", "--verbose", "--quiet"} <= set(out.replace(",", " ").split())


def test_nothing_at_all_is_a_usage_error_with_help(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys)
    assert status == Exit.USAGE
    assert "commands:" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspct", "x"], "AO101 unknown command 'inspct'; did you mean 'inspect'?"),
        (
            ["zzz"],
            f"AO101 unknown command 'zzz'; there is {COMMANDS}",
        ),
        (["--hlep"], "AO101 unknown flag '--hlep'; did you mean '--help'?"),
        (["inspect", "x", "--jsn"], "unknown argument '--jsn'; did you mean '--json'?"),
        (["inspect", "x", "--seq", "9"], "unknown argument '--seq'"),
        (["inspect"], "AO101 attnopt inspect: the following arguments are required: MODEL"),
        (["inspect", "x", "--sequence", "0"], "at least 1"),
        (["inspect", "x", "--sequence", "many"], "'many' is no whole number of at least 1"),
        (["inspect", "--model", "x"], "unknown argument '--model' (attnopt inspect --help"),
        (["inspect", ""], "AO102 MODEL is empty"),
        (["plan", "x", "--kv-cache", "50"], "at most 100%; did you mean 50%?"),
        (["plan", "x", "--kv-cache", "1", "--max-drop", "5"], "max_drop '5' would be 500%"),
        (["inspect", "no/such/model"], "AO102 no file or directory no/such/model"),
        (["inspect", "missing.pt2"], "AO102 no file or directory missing.pt2"),
        (["inspect", "~/no/such/model"], "AO102 no file or directory"),
        (["passes", "exact"], "unknown argument 'exact'"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, *words)
    assert (status, out) == (Exit.USAGE, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_wrong_debug_level_is_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ATTNOPT_DEBUG", "lots")
    status, _, err = run(capsys, "passes")
    assert status == Exit.USAGE
    assert err == "AO101 ATTNOPT_DEBUG is 'lots'; it takes a number from 0 to 6\n"


def test_a_neighbour_of_a_missing_directory_is_suggested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint(tmp_path / "code-llama")
    status, _, err = run(capsys, "inspect", str(tmp_path / "code-lama"))
    assert status == Exit.USAGE
    assert f"did you mean '{tmp_path / 'code-llama'}'?" in err


def test_a_directory_of_checkpoints_names_those_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint(tmp_path / "one")
    status, _, err = run(capsys, "inspect", str(tmp_path))
    assert status == Exit.USAGE
    assert f"there is one in {tmp_path / 'one'}" in err


@pytest.mark.parametrize(
    ("files", "status", "says"),
    [
        ({"config_json": "{"}, Exit.USAGE, "AO103 {}/config.json:1 is not JSON"),
        ({"config_json": "[]"}, Exit.USAGE, "AO103 {}/config.json is not a JSON object"),
        ({"config_json": "{}"}, Exit.USAGE, 'AO103 {}/config.json has no "model_type"'),
        ({"config_json": b"\xff\xfe"}, Exit.USAGE, "AO103 cannot read {}/config.json"),
        ({"config_json": "[" * 100_000}, Exit.USAGE, "AO103 "),
        ({"model_safetensors_index_json": "{}"}, Exit.USAGE, 'has no "weight_map"'),
        ({"pytorch_model_bin": b"x"}, Exit.SAFETY, "AO503 refused: {}/pytorch_model.bin"),
        ({"model_safetensors": b""}, Exit.SAFETY, "AO504 {}/model.safetensors is no safetensors"),
        ({"model_safetensors": b"\xff" * 8}, Exit.SAFETY, "AO504 "),
        ({"model_safetensors": safetensors(7, 6)}, Exit.SAFETY, "AO504 "),
        ({"model_safetensors": safetensors(7, 8)}, Exit.SAFETY, "AO504 "),
    ],
)
def test_a_broken_checkpoint_is_refused_before_it_is_opened(
    files: dict[str, str | bytes],
    status: Exit,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = checkpoint(tmp_path / "broken", **files)
    found, _, err = run(capsys, "inspect", folder)
    assert says.format(folder) in err
    assert found == status
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\\b", "c:x", "..", ""])
def test_an_index_that_leaves_the_directory_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = checkpoint(tmp_path / "model")
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    status, _, err = run(capsys, "inspect", folder)
    assert status == Exit.SAFETY
    assert err.startswith("AO502 refused: ")


def test_a_shard_that_is_missing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = checkpoint(tmp_path / "model")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    status, _, err = run(capsys, "inspect", folder)
    assert status == Exit.SAFETY
    assert "model-00001-of-00002.safetensors is missing" in err


def test_a_saved_program_needs_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model.pt2").write_bytes(b"x")
    status, _, err = run(capsys, "inspect", str(tmp_path / "model.pt2"))
    assert status == Exit.SAFETY
    assert "--trust-pickle" in err


def test_an_interruption_says_what_is_kept_of_what_was_measured(tmp_path: Path):
    work = tmp_path / "work"
    assert kept(work, 0.0) == "the same command goes on from the start"
    (work / "deep").mkdir(parents=True)
    (work / "deep" / "scores.json").write_text("{}")
    assert kept(work, 0.0) == f"what was measured is kept in {work}, and the same command goes on"
    assert kept(work, time.time() + 60) == "the same command goes on from the start"


def test_an_error_is_a_document_too_with_json(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "inspect", "no/such/model", "--json")
    document = json.loads(out)
    assert document["schema"] == "attnopt.error/1"
    assert document["error"]["code"] == "AO102"
    assert document["error"]["exit"] == status == Exit.USAGE
