"""`attnopt inspect` and `explain` on real models, `passes` and `doctor` on this machine."""

import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import cli_models
import pytest

from attnopt.cli import Exit, main
from attnopt.nouns import Site

pytestmark = pytest.mark.usefixtures("captured_once")
ROOT = Path(__file__).parents[1]
BLOCKS = "cli_models:blocks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(cli_models.save_checkpoint(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("configuration")
    made = cli_models.config()
    made.architectures = ["LlamaForCausalLM"]
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def report(checkpoint: str) -> dict[str, Any]:
    with redirect_stdout(StringIO()) as printed:
        assert main(["inspect", checkpoint, "--json"]) == 0
    found = json.loads(printed.getvalue())
    assert isinstance(found, dict)
    return found


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_equal_layers_are_one_row_that_fits_the_page(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, "inspect", checkpoint)
    rows = [line.split() for line in out.splitlines() if "self_attn " in line]
    assert status == 0
    assert [row[:5] for row in rows] == [["0-1", "model.layers.*.self_attn", "MQA", "3/1", "8"]]
    assert max(map(len, out.splitlines()[1:])) <= 100
    assert "\x1b" not in out
    assert "Traceback" not in err


def test_json_has_every_fact_of_every_site(report: dict[str, Any]):
    assert report["schema"] == "attnopt.inspect/1"
    assert len(report["sites"]) == 2
    for site in report["sites"]:
        assert {field.name for field in fields(Site)} <= set(site)
        assert set(site["projections"]) == {"q", "k", "v", "o"}
        assert site["projections"]["q"]["rows"] == ["0:8", "8:16", "16:24"]
        assert site["passes"] == ["amp", "blocks", "exact", "latent", "linear", "moh", "window"]
        assert site["kv_bytes_per_token"] == 2 * 8 * 4
    assert 0 < sum(site["flops_share"] for site in report["sites"]) < 1
    assert report["workload"] == {"batch": 1, "sequence": 127, "past": 0}
    assert {"near_misses", "uncaptured", "refused", "passes", "captured"} <= set(report)


def test_weights_are_not_needed(
    report: dict[str, Any], configuration: str, capsys: pytest.CaptureFixture[str]
):
    bare = document(capsys, "inspect", configuration)
    assert bare["sites"] == report["sites"]
    assert bare["parameters"] == report["parameters"] > 0


def test_verbose_prints_every_site(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "inspect", BLOCKS, "-v", "--sequence", "63")
    assert status == 0
    assert "sequence 63" in out
    for number in range(2):
        assert f"\nblocks.{number}\n  module    blocks.{number}\n" in out
        assert f"blocks.{number}.qkv.weight (linear), head 0 = rows 0:8" in out


def test_quiet_leaves_results_only(capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "inspect", BLOCKS, "--quiet")
    assert (status, err) == (0, "")
    assert "Next:" not in out
    assert "blocks.*" in out


def test_a_model_that_does_not_run_says_what_it_raised(capsys: pytest.CaptureFixture[str]):
    status, _, err = run(capsys, "inspect", "cli_models:too_wide")
    assert status == Exit.NOTHING
    assert "the source does not run on the example: RuntimeError: mat1 and mat2" in err


def test_what_is_no_model_of_transformers_loads_as_its_own_program(
    capsys: pytest.CaptureFixture[str],
):
    status, out, _ = run(capsys, "inspect", BLOCKS)
    assert status == 0
    assert "tier 0" not in out


def test_weights_that_are_read_elsewhere_have_no_exact_form(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "explain", "cli_models:telling")
    assert status == 0
    assert "after the exact rewrite:\n# there is none" in out
    assert "the attention weights are read elsewhere" in out.splitlines()[-1]


def test_a_model_without_attention_is_status_three(capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "inspect", "cli_models:perceptron")
    assert status == Exit.NOTHING
    assert "0 attentions found" in out
    assert "AO201 Sequential has no attention" in err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("cli_models:number", "must return a module"),
        ("cli_models:nothing", "cannot import 'cli_models:nothing'"),
        ("no_such_module:model", "cannot import 'no_such_module:model'"),
        ("cli_models:alone", "returned a Blocks without an example call; return (module, args"),
        ("cli_models:failing", "'cli_models:failing' failed: RuntimeError: not today ("),
    ],
)
def test_a_factory_that_gives_no_model_is_a_usage_error(
    model: str, says: str, capsys: pytest.CaptureFixture[str]
):
    status, _, err = run(capsys, "inspect", model)
    assert status == Exit.USAGE
    assert err.startswith("AO104 ")
    assert says in err


def test_explain_shows_both_forms_and_the_reasons(capsys: pytest.CaptureFixture[str]):
    found = document(capsys, "explain", BLOCKS, "blocks.1")
    assert found["site"] == "blocks.1"
    assert "softmax(" in found["before"]
    assert "attention(" in found["after"]
    assert "softmax(" not in found["after"]
    assert found["why"]


def test_explain_takes_the_end_of_a_name(checkpoint: str, capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "explain", checkpoint, "1.self_attn")
    assert status == 0
    assert out.startswith("model.layers.1.self_attn\n\nbefore:\n")
    assert out.index("before:") < out.index("after the exact rewrite:") < out.index("why:")


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (["blocks.7"], "AO105 no site 'blocks.7'; did you mean 'blocks."),
        (["zzzzzzzz"], "AO105 no site 'zzzzzzzz'; there is blocks.0, blocks.1"),
        ([], "AO105 which site? blocks.0, blocks.1"),
    ],
)
def test_a_wrong_site_gets_the_right_ones(
    site: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    status, _, err = run(capsys, "explain", BLOCKS, *site)
    assert status == Exit.USAGE
    assert says in err


def test_passes_are_the_files_of_the_folder(capsys: pytest.CaptureFixture[str]):
    found = document(capsys, "passes")["passes"]
    folder = ROOT / "passes"
    files = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    assert [item["name"] for item in found] == files
    assert all(item["summary"].endswith(".") for item in found)
    assert {item["exact"] for item in found} <= {True, False}


def test_doctor_finds_what_attnopt_needs(capsys: pytest.CaptureFixture[str]):
    found = {item["what"]: item for item in document(capsys, "doctor")["findings"]}
    assert {"torch", "transformers", "CUDA", "Triton"} <= set(found)
    assert found["torch"]["state"] in {"ok", "warn"}
    assert all(item["remedy"] for item in found.values() if item["state"] == "fail")


@pytest.mark.parametrize("where", ["import", "call"])
def test_an_interrupt_ends_with_status_130_and_one_line(where: str, tmp_path: Path):
    wait = "print('ready', flush=True); time.sleep(60)"
    body = {"import": f"{wait}\ndef model(): ...", "call": f"def model():\n    {wait}"}
    (tmp_path / "slow.py").write_text(f"import time\n{body[where]}\n")
    running = subprocess.Popen(
        [sys.executable, "-m", "attnopt", "inspect", "slow:model"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        # What runs in the background of a shell ignores interrupts, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == Exit.INTERRUPTED
    assert err == "AO130 interrupted\n"
