"""Deltas: small, equal to the artifact bit by bit with their base, and no model without it."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dha_models import decoder, ids, uneven
from safetensors.torch import load_file, save_file

import attnopt
from attnopt.artifacts.delta import CONTENT, FILES, STATISTICS, export_delta
from attnopt.artifacts.manifest import IntegrityError, write_manifest
from attnopt.artifacts.restoring import restore
from attnopt.artifacts.spans import Header, spans_of
from attnopt.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    decoder("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return folder


@pytest.fixture(scope="module")
def result(base: Path) -> Any:
    """The second layer has half the keys and values of the first: tier 1."""
    return uneven(base)


@pytest.fixture(scope="module")
def artifact(result: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attnopt.save(result, tmp_path_factory.mktemp("artifact") / "out")


@pytest.fixture
def delta(artifact: Path, base: Path, tmp_path: Path) -> Path:
    return export_delta(artifact, tmp_path / "delta", base).path


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def edited(delta: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change what a delta says of itself, with a manifest that fits."""
    content = json.loads((delta / CONTENT).read_text())
    change(content)
    (delta / CONTENT).write_text(json.dumps(content))
    write_manifest(delta)
    return delta


def test_a_delta_holds_only_the_tensors_that_differ(artifact: Path, base: Path, tmp_path: Path):
    made = export_delta(artifact, tmp_path / "delta", base)
    names = {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"}
    assert (set(made.changed), made.new, made.removed, made.base) == (names, (), (), "tiny")
    stored = load_file(made.path / "attnopt/delta-00001.safetensors")
    whole = load_file(artifact / "model.safetensors")
    assert stored.keys() == names
    assert all(torch.equal(stored[n], whole[n]) and stored[n].is_contiguous() for n in names)
    assert made.equal == len(whole) - 4
    assert not (made.path / FILES / "tokenizer.json").exists()
    assert (made.path / FILES / "attnopt/plan.yaml").is_file()


def test_a_delta_is_smaller_by_what_the_base_has(tmp_path: Path):
    wide = transformers.LlamaConfig(hidden_size=512, num_hidden_layers=1, vocab_size=600)
    wide.intermediate_size, wide.num_attention_heads = 1000, 8
    wide.num_key_value_heads, wide.head_dim = 8, 64
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path / "base")
    program = attnopt.capture(tmp_path / "base")
    name = "model.layers.0.self_attn.k_proj.weight"
    program = program.with_weights({name: program.weights[name] * 2})
    made = export_delta(
        attnopt.save(program, tmp_path / "out"), tmp_path / "delta", tmp_path / "base"
    )
    assert made.changed == (name,)
    tensor = 512 * 512 * 4
    assert tensor < made.delta_bytes < tensor + 16_000
    assert made.delta_bytes < 0.11 * made.artifact_bytes


@pytest.mark.parametrize("tier", [0, 1, 2])
@pytest.mark.parametrize("shard", [10**9, 9_000])
def test_with_its_base_it_is_the_artifact_bit_by_bit(
    tier: int, shard: int, result: Any, base: Path, tmp_path: Path
):
    made = result if tier else result.reference
    out = attnopt.save(made, tmp_path / "out", tier=tier, max_shard_size=shard)  # type: ignore[arg-type]
    export_delta(out, tmp_path / "delta", base, statistics=True)
    again = restore(tmp_path / "delta", base, tmp_path / "again")
    assert files(again) == files(out)
    assert len(list(out.rglob("*.safetensors"))) > 3 or shard > 9_000


def test_statistics_are_left_out_unless_asked_for(artifact: Path, base: Path, tmp_path: Path):
    made = export_delta(artifact, tmp_path / "delta", base)
    assert made.left_out == (STATISTICS,)
    again, whole = files(restore(made.path, base, tmp_path / "again")), files(artifact)
    assert set(whole) - set(again) == {STATISTICS}
    assert {n for n in again if again[n] != whole[n]} == {"attnopt/manifest.json"}
    attnopt.load(tmp_path / "again")


@pytest.mark.parametrize("tier", [1, 2])
def test_a_delta_is_loaded_with_its_base(tier: int, result: Any, base: Path, tmp_path: Path):
    out = attnopt.save(result, tmp_path / "out", tier=tier)  # type: ignore[arg-type]
    export_delta(out, tmp_path / "delta", base)
    tokens = ids(2, 13)
    want = attnopt.load(out)(input_ids=tokens).logits
    model: Any = attnopt.load(tmp_path / "delta", base=base)
    assert torch.equal(model(input_ids=tokens).logits, want)
    assert model.config.name_or_path == str(tmp_path / "delta")


def test_a_renamed_tensor_is_found_in_the_base(artifact: Path, base: Path, tmp_path: Path):
    other = tmp_path / "base"
    other.mkdir()
    (other / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    save_file({f"old.{n}": t for n, t in tensors.items()}, other / "model.safetensors")
    made = export_delta(artifact, tmp_path / "delta", other)
    assert len(made.new) == 4
    assert restore(made.path, other, tmp_path / "again")
    assert attnopt.load(tmp_path / "again")


def test_a_delta_alone_is_refused_by_name(delta: Path):
    with pytest.raises(ValueError, match=r"is a delta, no model: load.*'tiny'"):
        attnopt.load(delta)
    with pytest.raises(ValueError, match="--to full --base"):
        attnopt.capture(delta)


def test_what_is_whole_takes_no_base(artifact: Path, base: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is whole"):
        attnopt.load(artifact, base=base)
    with pytest.raises(ValueError, match="is no delta"):
        restore(artifact, base, tmp_path / "out")


@pytest.mark.parametrize("first", [pytest.param("import attnopt", marks=pytest.mark.slow), ""])
def test_stock_loaders_fail_loudly(first: str, delta: Path):
    """A process of its own, as only there attnopt is not imported: that takes seconds."""
    code = f"""
{first}
import transformers
for name in ("AutoModel", "AutoModelForCausalLM", "LlamaForCausalLM", "GPT2Model", "BertModel"):
    try:
        getattr(transformers, name).from_pretrained({str(delta)!r})
    except (ValueError, OSError) as error:
        print(name, "failed:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=delta.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("failed:") == 5
    assert done.stdout.count("`attnopt_delta`") == 2


def _with_weights(base: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t["model.norm.weight"].add_(1), "has another tensor model.norm.weight"),
        (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            "has another tensor model.norm.weight",
        ),
    ],
)
def test_another_base_is_refused_and_nothing_written(
    change: Any, told: str, delta: Path, base: Path, tmp_path: Path, capsys: Any
):
    other = _with_weights(base, tmp_path / "other", change)
    out = tmp_path / "again"
    assert main(["export", str(delta), "--to", "full", "--base", str(other), "-o", str(out)]) == 5
    err = capsys.readouterr().err
    assert err.startswith("AO502 ")
    assert err.count("\n") == 1
    assert told in err
    assert "'tiny'" in err
    assert not out.exists()


def test_a_base_of_other_files_with_the_same_tensors_will_do(
    delta: Path, base: Path, tmp_path: Path
):
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=9_000)
    (tmp_path / "sharded/tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    again = restore(delta, tmp_path / "sharded", tmp_path / "again")
    assert files(again) == files(restore(delta, base, tmp_path / "other"))


def test_a_file_that_the_base_no_longer_has_is_named(delta: Path, base: Path, tmp_path: Path):
    other = _with_weights(base, tmp_path / "other", lambda t: None)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"has not the file tokenizer\.json"):
        restore(delta, other, tmp_path / "again")


FIRST = "model.safetensors"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(schema="attnopt.delta/9"), "schema"),
        (lambda c: c.pop("base"), "base"),
        (lambda c: c.update(weights=[]), "broken"),
        (lambda c: c["weights"][FIRST].update(shard="../x.safetensors"), "no weight file"),
        (lambda c: c["weights"][FIRST].update(shard="/etc/passwd"), "no weight file"),
        (lambda c: c["weights"][FIRST].update(shard=None), "has no tensor"),
        (lambda c: c["weights"][FIRST].update(header="{}"), "sha256"),
        (lambda c: c["weights"][FIRST].update(header="["), "no header"),
        (
            lambda c: c["weights"][FIRST].update(header='{"x": {"data_offsets": [0, 1e999]}}'),
            "no header",
        ),
        (
            lambda c: c["weights"][FIRST].update(
                header='{"x": {"data_offsets": [0, 99999999]}}', from_base={"x": "y"}
            ),
            "more than base and delta hold",
        ),
        (lambda c: c["weights"].update({"../out.safetensors": c["weights"][FIRST]}), "not list"),
        (lambda c: c["weights"][FIRST]["from_base"].clear(), "has no tensor"),
        (lambda c: c["base"].update(sha256={}), "without naming its hash"),
        (
            lambda c: c["weights"][FIRST]["from_base"].update({"model.norm.weight": "nothing"}),
            "without naming its hash",
        ),
    ],
)
def test_a_hostile_description_is_refused(
    change: Callable[[dict[str, Any]], object], told: str, delta: Path, base: Path, tmp_path: Path
):
    with pytest.raises(IntegrityError, match=told):
        restore(edited(delta, change), base, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "a/./b", "", ".", "a\\b", "c:x"])
def test_a_path_that_leaves_the_artifact_is_refused(
    name: str, delta: Path, base: Path, tmp_path: Path
):
    place = delta / FILES / "attnopt/manifest.json"
    content = json.loads(place.read_text())
    content["files"][name] = {"size": 1, "sha256": "0" * 64}
    place.write_text(json.dumps(content))
    write_manifest(delta)
    with pytest.raises(IntegrityError, match="broken"):
        restore(delta, base, tmp_path / "again")


def test_code_from_a_delta_is_refused(delta: Path, base: Path, tmp_path: Path):
    (delta / FILES / "modeling.py").write_text("1/0")
    write_manifest(delta)
    with pytest.raises(IntegrityError, match="can run code"):
        restore(delta, base, tmp_path / "again")


@pytest.mark.parametrize(
    "name", [CONTENT, f"{FILES}/config.json", "attnopt/delta-00001.safetensors"]
)
def test_bit_rot_in_a_delta_is_found(name: str, delta: Path, base: Path, tmp_path: Path):
    content = bytearray((delta / name).read_bytes())
    content[len(content) // 2] ^= 1
    (delta / name).write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256"):
        restore(delta, base, tmp_path / "again")


def test_a_failed_export_leaves_what_was_there(
    delta: Path, artifact: Path, base: Path, monkeypatch: pytest.MonkeyPatch
):
    before = files(delta)
    monkeypatch.setattr("attnopt.artifacts.delta.write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_delta(artifact, delta, base)
    assert files(delta) == before
    assert not list(delta.parent.glob(".*"))


def test_what_is_read_is_never_replaced(artifact: Path, base: Path, delta: Path):
    for place in (artifact, base, artifact / "inside", base.parent):
        with pytest.raises(ValueError, match="overlap"):
            export_delta(artifact, place, base)
    with pytest.raises(ValueError, match="overlap"):
        restore(delta, base, delta)


def test_a_base_that_shares_nothing_is_refused(artifact: Path, base: Path, tmp_path: Path):
    other = _with_weights(base, tmp_path / "other", lambda t: [x.add_(1.5) for x in t.values()])
    with pytest.raises(ValueError, match="has no tensor of"):
        export_delta(artifact, tmp_path / "delta", other)


def test_the_base_is_found_where_the_command_names_it(
    result: Any, base: Path, tmp_path: Path, capsys: Any
):
    command = f"attnopt optimize {base} -o {tmp_path / 'out'} --kv-cache 50%"
    attnopt.save(replace(result, command=command), tmp_path / "out")
    words = ["export", str(tmp_path / "out"), "--to", "delta", "-o", str(tmp_path / "delta")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "tensors, beside tiny: 4 changed, 0 new, 0 removed, 17 as in the base" in shown
    assert "left out: attnopt/statistics.safetensors" in shown
    again = tmp_path / "again"
    words = ["export", str(tmp_path / "delta"), "--to", "full", "-o", str(again), "--json"]
    assert main([*words, "--base", str(base)]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(again)
    assert attnopt.load(again)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ARTIFACT", "--to", "delta"], "AO114 .*which it calls 'tiny': give it with --base DIR"),
        (["DELTA", "--to", "full"], "AO111 .*give --base DIR"),
        (["DELTA", "--to", "delta", "--base", "BASE"], "is a delta already"),
        (["BASE", "--to", "delta", "--base", "BASE"], "no config of an artifact|no artifact"),
        (["ARTIFACT", "--to", "delta", "--base", "no/such"], "no/such is no checkpoint"),
        (["ARTIFACT", "--to", "delta", "--base", "DELTA"], "has no weights to start from"),
        (["ARTIFACT", "--to", "stock", "--base", "BASE"], "AO111 --base and --statistics belong"),
        (["cli_models:blocks", "--to", "delta", "--base", "BASE"], "is no directory"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    words: list[str],
    told: str,
    artifact: Path,
    base: Path,
    delta: Path,
    tmp_path: Path,
    capsys: Any,
):
    places = {"ARTIFACT": artifact, "BASE": base, "DELTA": delta}
    given = [str(places.get(word, word)) for word in words]
    assert main(["export", *given, "-o", str(tmp_path / "out")]) in (2, 5)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(told, err), err
    assert not (tmp_path / "out").exists()


def test_a_base_in_a_cache_of_the_hub_is_named_with_its_commit(
    artifact: Path, base: Path, tmp_path: Path
):
    home = tmp_path / "models--some--model"
    blobs, place = home / "blobs", home / "snapshots/0123abc"
    blobs.mkdir(parents=True)
    place.mkdir(parents=True)
    for file in base.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (place / file.name).symlink_to(blobs / file.name)
    made = export_delta(artifact, tmp_path / "delta", place)
    assert made.base == "some/model@0123abc"
    assert "base_model: some/model\n" in (made.path / "README.md").read_text()
    assert restore(made.path, place, tmp_path / "again")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2) + b"{}" + b"more",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 37) + b'{"x": {"data_offsets": [0, 9]}}      ',
        struct.pack("<Q", 37) + b'{"x": {"data_offsets": [4, 9]}}      ' + b"123456789",
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is"):
        spans_of(tmp_path / "x.safetensors")


def test_a_header_keeps_order_and_alignment(tmp_path: Path):
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2), "c": torch.ones(0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = Header.of(tmp_path / "x.safetensors")
    assert header.sizes == {"b": 8, "c": 0, "a": 3}
    assert header.only(["b", "a"]).start % 8 == 0
