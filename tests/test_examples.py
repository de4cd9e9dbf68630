"""The examples run, and say what they promise. Each is one file and is listed in README.md."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import attnopt
from attnopt import passes

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LLAMA = str(EXAMPLES / "models" / "code-llama")
DIGITS = str(EXAMPLES / "models" / "vit-digits")
LISTED = (
    *("gpt_lm", "encoder", "vit", "odd_module", "compiled", "serve_onnx", "own_pass"),
    *("greedy", "exact_parity", "train_code_llama", "train_vit_digits"),
)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import an example as a module of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_readme_lists_every_example():
    text = (ROOT / "README.md").read_text()
    told = [name for name in LISTED if f"examples/{name}.py" in text]
    assert told == list(LISTED)
    tools = {"update_readme"}
    assert {p.stem for p in EXAMPLES.glob("*.py")} - tools == set(LISTED)


def test_a_module_that_is_written_oddly_is_found_and_rewritten(monkeypatch, capsys):
    assert example("odd_module", monkeypatch).main([]) == 0
    out = capsys.readouterr().out
    assert "4 heads of 12, soft cap 5.0" in out
    assert "rewritten exactly: 1 of 1" in out


def test_an_encoder_is_pruned(monkeypatch, capsys):
    assert example("encoder", monkeypatch).main(["--params", "90%"]) == 0
    out = capsys.readouterr().out
    assert "1 - cosine of the embeddings" in out
    assert "embeddings of shape [4, 64]" in out


def test_ones_own_pass_does_what_it_says(monkeypatch):
    own = example("own_pass", monkeypatch)
    from dha_models import decoder, exactly, ids

    source = decoder("llama_gqa")
    program = exactly(source)
    stats = attnopt.calibrate(program, ids(8, 24))
    with passes.extended(temperature=own):
        assert "temperature" in passes.names()
        assert passes.describe("temperature").summary.startswith("Change the temperature")
        made = {t: attnopt.apply(program, plan_of(program, stats, t)) for t in (1.0, 2.0)}
        with pytest.raises(ValueError, match="must be above 0"):
            attnopt.apply(program, plan_of(program, stats, -1.0))
    assert "temperature" not in passes.names()
    for layer in source.model.layers:
        layer.self_attn.scaling /= 2
    call = {"input_ids": ids(2, 11)}
    want = source(**call).logits
    assert bool((made[2.0](**call).logits - want).abs().max() < 1e-4 * want.abs().max())
    assert bool((made[1.0](**call).logits == program(**call).logits).all())


def plan_of(program: attnopt.Program, stats, temperature: float) -> attnopt.Plan:
    settings = {"temperature": temperature}
    choices = tuple(attnopt.Choice(s.name, "temperature", settings) for s in program.sites)
    return attnopt.Plan(choices, statistics=stats)


def test_a_pass_of_ones_own_takes_no_known_name_and_lacks_nothing():
    with pytest.raises(ValueError, match="there is a pass 'dha' already"), passes.extended(dha=sys):
        pass
    with pytest.raises(ValueError, match="lacks Config, fits"), passes.extended(mine=sys):
        pass


@pytest.mark.slow
def test_ones_own_pass_runs_from_the_command_line(monkeypatch, capsys):
    assert example("own_pass", monkeypatch).main([LLAMA, "--data", "stdlib:4x64"]) == 0
    assert "95 % confidence" in capsys.readouterr().out


@pytest.mark.slow
def test_a_language_model_writes_before_and_after(monkeypatch, capsys, tmp_path: Path):
    out = str(tmp_path / "out")
    words = [LLAMA, out, "--max-drop", "60%", "--data", "stdlib:8x96"]
    assert example("gpt_lm", monkeypatch).main(words) == 0
    assert (tmp_path / "out/attnopt/report.html").is_file()
    assert capsys.readouterr().out.count("def read_config") == 2


@pytest.mark.slow
def test_a_vision_transformer_is_pruned(monkeypatch, capsys, tmp_path: Path):
    pytest.importorskip("sklearn")
    words = [DIGITS, str(tmp_path / "out"), "--params", "95%"]
    assert example("vit", monkeypatch).main(words) == 0
    assert "held-out digits read right" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_is_compiled(monkeypatch, capsys):
    assert example("compiled", monkeypatch).main([LLAMA, "--inner", "eager"]) == 0
    assert "6 attentions found, 6 rewritten" in capsys.readouterr().out


@pytest.mark.slow
def test_a_decoder_is_served_without_torch(monkeypatch, capsys, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    words = [LLAMA, str(tmp_path / "onnx"), "--tokens", "6"]
    assert example("serve_onnx", monkeypatch).main(words) == 0
    assert "def read_config" in capsys.readouterr().out
