"""Artifacts: whole or not at all, checked on loading, and plain Transformers loads them."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from dha_models import decoder, ids
from transformers import (
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import attnopt
from attnopt.artifacts.manifest import IntegrityError
from attnopt.artifacts.programs import source_config
from attnopt.artifacts.saving import refuse_foreign
from attnopt.program import Program


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    decoder("llama").save_pretrained(folder)
    (folder / "LICENSE").write_text("as the source says")
    (folder / "evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="module")
def program(source: Path) -> Program:
    return attnopt.apply(attnopt.capture(source), "exact")


@pytest.fixture(scope="module")
def halved(program: Program) -> attnopt.artifacts.saving.Result:
    return attnopt.optimize(program, {"kv_cache": "50%"}, data=ids(16, 24))


def changed(program: Program, value: float) -> Program:
    names = [b.name for b in program.bindings.values() if b.kind == "parameter"]
    return program.with_weights(
        {name: torch.full_like(program.weights[name], value) for name in names}
    )


def test_a_fresh_process_without_attnopt_computes_what_the_program_does(halved, tmp_path: Path):
    attnopt.save(halved, tmp_path / "out")
    tokens = ids(2, 13)
    torch.save(tokens, tmp_path / "tokens.pt")
    code = f"""
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
tokens = torch.load({str(tmp_path / "tokens.pt")!r})
with torch.no_grad():
    result = model(input_ids=tokens, use_cache=True)
assert result.past_key_values.layers[0].keys.shape == (2, 2, 13, 8)
assert not any(name.startswith("attnopt") for name in sys.modules)
torch.save(result.logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt")
    assert torch.allclose(logits, halved.program(input_ids=tokens).logits, atol=1e-5)


def test_what_is_saved_is_what_was_measured(halved, tmp_path: Path):
    out = attnopt.save(halved, tmp_path / "out")
    report = json.loads((out / "attnopt/report.json").read_text())
    assert report["accepted"] is True
    assert report["measured"]["kv_bytes_per_token"] == [512, 256]
    assert report["quality"]["delta_nll"]["mean"] == halved.report.delta_nll.mean
    assert [c["config"]["kv_heads"] for c in report["changed"]] == [2, 2]
    assert (out / "LICENSE").read_text() == "as the source says"
    assert not (out / "evil.py").exists()
    plan = attnopt.Plan.load(out / "attnopt/plan.yaml")
    assert plan.choices == halved.plan.choices
    replayed = attnopt.apply(halved.reference, plan)
    loaded = dict(attnopt.load(out).named_parameters())
    for name in (
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ):
        assert torch.equal(replayed.weights[name], loaded[name])


def test_loading_gives_the_model_bit_by_bit(program: Program, tmp_path: Path):
    attnopt.save(program, tmp_path / "out")
    model = attnopt.load(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, program.weights[name])


@pytest.mark.parametrize("tier", [0, 2])
def test_what_was_never_a_checkpoint_generates_as_its_source_does(tier: Any, tmp_path: Path):
    """The source ends no text, and has a flag that Transformers saves with sampling only."""
    model = decoder("llama")
    model.generation_config = GenerationConfig(max_length=30, pad_token_id=3, temperature=0.5)
    program = attnopt.apply(attnopt.capture(model, (), {"input_ids": ids(2, 9)}), "exact")
    loaded: Any = attnopt.load(attnopt.save(program, tmp_path / "out", tier=tier))
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert torch.equal(loaded.generate(ids(2, 9)), model.generate(ids(2, 9)))


def test_a_folder_that_is_not_ours_is_left_alone(program: Program, source: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not write"):
        attnopt.save(program, tmp_path)
    with pytest.raises(ValueError, match="source itself"):
        attnopt.save(program, source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="link"):
        attnopt.save(program, tmp_path / "link")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda out: _flip(out / "model.safetensors"), "sha256"),
        (lambda out: _flip(out / "attnopt/plan.yaml"), "sha256"),
        (lambda out: (out / "generation_config.json").unlink(), "missing"),
        (lambda out: (out / "more.safetensors").write_bytes(b"x"), "not in the manifest"),
        (lambda out: (out / "pytorch_model.bin").write_bytes(b"x"), "can run code"),
        (lambda out: (out / "modeling.py").write_text("1/0"), "can run code"),
        (lambda out: (out / "extra.json").symlink_to("/etc/hostname"), "link"),
        (lambda out: (out / "attnopt/manifest.json").unlink(), "no artifact"),
        (lambda out: (out / "attnopt/manifest.json").write_text("[]"), "broken"),
        (
            lambda out: (out / "attnopt/manifest.json").write_text(
                '{"format": 1, "files": {"../x": {"size": 1, "sha256": "' + "0" * 64 + '"}}}'
            ),
            "broken",
        ),
    ],
)
def test_a_harmed_artifact_is_refused(harm, words: str, program: Program, tmp_path: Path):
    out = attnopt.save(program, tmp_path / "out")
    harm(out)
    with pytest.raises(IntegrityError, match=words):
        attnopt.load(out)


def test_an_edited_config_is_refused_even_when_not_strict(program: Program, tmp_path: Path):
    out = attnopt.save(program, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(IntegrityError, match="auto_map"):
        attnopt.load(out, strict=False)


def test_a_failed_save_leaves_what_was_there(program: Program, tmp_path: Path, monkeypatch):
    out = attnopt.save(program, tmp_path / "out")
    before = (out / "attnopt/manifest.json").read_bytes()
    monkeypatch.setattr("attnopt.artifacts.saving.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attnopt.save(changed(program, 1.0), out)
    assert (out / "attnopt/manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("points", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_old_or_the_new(points: int, program: Program, tmp_path: Path):
    """Kill -9 at random points of a save over an older artifact; the seed is printed."""
    out, old, new = tmp_path / "out", changed(program, 1.0), changed(program, 2.0)
    start = time.monotonic()
    attnopt.save(old, out)
    whole = time.monotonic() - start
    seed = time.time_ns() % 10**6
    print(f"seed {seed}")
    random = Random(seed)
    seen: list[float] = []
    for _ in range(points):
        _killed_after(random.uniform(0, 1.3 * whole), new, out)
        values = {float(t.unique()) for t in attnopt.load(out).state_dict().values()}
        assert len(values) == 1, "a mixture"
        seen.extend(values)
        if values == {2.0}:
            attnopt.save(old, out)
    attnopt.save(old, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    print(f"{seen.count(1.0)} times the old one, {seen.count(2.0)} times the new one")


def _killed_after(seconds: float, program: Program, out: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    child = multiprocessing.get_context("fork").Process(target=attnopt.save, args=(program, out))
    child.start()
    torch.set_num_threads(threads)
    time.sleep(seconds)
    if child.is_alive() and child.pid is not None:
        os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_a_place_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; name another directory"):
        refuse_foreign(tmp_path / "file" / "deep" / "out")
    refuse_foreign(tmp_path / "new" / "deep" / "out")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(ValueError, match="cannot be written to; name another directory"):
        refuse_foreign(tmp_path / "new" / "out")


def untied_t5(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Save a T5 whose head is its own, as that of FLAN-T5 is; its config cannot say so."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=19, decoder_start_token_id=0)
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(19, 16), requires_grad=False)
    model.all_tied_weights_keys.pop("lm_head.weight")
    model.save_pretrained(folder)
    ids = torch.arange(1, 8).view(1, 7)
    return model, {"input_ids": ids, "decoder_input_ids": ids[:, :3]}


@torch.no_grad()
def test_weights_that_a_config_calls_tied_stay_apart_where_a_checkpoint_has_two(tmp_path: Path):
    model, call = untied_t5(tmp_path / "source")
    want = model(**call).logits
    program = attnopt.apply(attnopt.capture(tmp_path / "source"), "exact")
    torch.testing.assert_close(program(**call).logits, want, rtol=0, atol=1e-5)
    attnopt.save(program, tmp_path / "out", tier=0)
    torch.testing.assert_close(attnopt.load(tmp_path / "out")(**call).logits, want)


@torch.no_grad()
def test_weights_that_no_graph_reads_are_kept_in_a_stock_checkpoint(tmp_path: Path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model: Any = Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).eval()
    torch.nn.init.normal_(model.embeddings.mask_token)  # zeros would come back without being kept
    call = {"pixel_values": torch.randn(1, 3, 28, 28)}
    program = attnopt.apply(attnopt.capture(model, (), call), "exact")
    attnopt.save(program, tmp_path / "out", tier=0)
    made = attnopt.load(tmp_path / "out").state_dict()
    assert torch.equal(made["embeddings.mask_token"], model.embeddings.mask_token)


def test_a_config_with_an_infinite_number_is_read_again(tmp_path: Path):
    config = {"model_type": "bamba", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    found = source_config(tmp_path, {"source_config": config})
    assert list(found.time_step_limit) == [0.0, math.inf]
