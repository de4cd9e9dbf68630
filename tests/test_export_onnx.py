"""`attnopt.export_onnx` and `attnopt export`: the file, its names, and the comparison when it runs.

An export takes seconds, most of them in torch.onnx; so two exports serve all fast tests.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from dha_models import decoder
from torch import nn

import attnopt
from attnopt.cli import main
from attnopt.ops import attention_reference

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

import onnx

from attnopt.backends.ort import Export, exporting, operators, parity
from attnopt.backends.ort.attention import attend
from attnopt.backends.ort.exporting import signatures_of
from attnopt.backends.ort.providers import runs_here
from attnopt.verifying import in_float32

# Libraries of the exporter warn of their own ways.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
STEPS = 64


@pytest.fixture(scope="module")
def program() -> attnopt.Program:
    return attnopt.capture(decoder("llama_gqa"))


@pytest.fixture(scope="module")
def made(program: attnopt.Program, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return attnopt.export_onnx(program, tmp_path_factory.mktemp("onnx") / "out")


def shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def test_prefill_and_decoding_agree_with_the_program(made: Export):
    assert made.accepted
    assert [(c.equal, c.tokens) for c in made.parity.cases] == [(STEPS, STEPS)] * 4
    assert max(c.max_delta_logit for c in made.parity.cases) < 1e-5


def test_inputs_and_outputs_have_the_names_of_onnxruntime_genai(made: Export):
    graph = onnx.load(made.path, load_external_data=False).graph
    past = ["batch", 4, "past", 4]
    assert shapes(graph.input) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{n}.{x}": past for n in (0, 1) for x in ("key", "value")},
    }
    present = ["batch", 4, "past + sequence", 4]
    assert shapes(graph.output) == {
        "logits": ["batch", "sequence", 61],
        **{f"present.{n}.{x}": present for n in (0, 1) for x in ("key", "value")},
    }


def test_the_file_is_portable_and_says_nothing_of_the_machine(made: Export):
    model = onnx.load(made.path, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", made.opset)]
    assert (model.producer_name, model.ir_version <= 11) == ("attnopt", True)
    text = made.path.read_bytes()
    assert str(Path(attnopt.__file__).parents[1]).encode() not in text
    assert b".py" not in text


def test_weights_lie_beside_the_file_in_float32(made: Export):
    model = onnx.load(made.path, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.external_data]
    assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {
        "model.onnx.data"
    }
    assert {t.data_type for t in outside} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    report = json.loads((made.path.parent / "attnopt/export.json").read_text())
    assert (report["schema"], report["dtype"]) == ("attnopt.export/1", "float32")


def test_one_mask_serves_all_layers(made: Export):
    nodes = onnx.load(made.path, load_external_data=False).graph.node
    assert sum(n.op_type == "LessOrEqual" for n in nodes) == 1


def test_a_file_that_computes_something_else_is_rejected(
    program: attnopt.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """The mask starts at the top left, as the standard op's `is_causal` does: wrong at decode."""
    folder = tmp_path / "model"
    decoder("llama_gqa").save_pretrained(folder)

    def wrong(q: Any, keys: Any, memo: Any, given: Any) -> Any:
        seen = torch.ones(q.shape[2], keys, dtype=torch.bool).tril()
        return torch.where(seen, 0.0, torch.finfo(q.dtype).min), None

    monkeypatch.setattr(operators, "hidden_keys", wrong)
    words = ["export", str(folder), "--to", "onnx", "-o", str(tmp_path / "out"), "--steps", "3"]
    assert main(words) == 4
    kept = tmp_path / "out.rejected/model.onnx.rejected"
    shown = capsys.readouterr().out
    assert "REJECTED: ONNX Runtime computes something else" in shown
    assert f"kept as {kept}" in " ".join(shown.split())
    assert kept.is_file()
    assert not (tmp_path / "out").exists()


def test_a_crash_of_the_runtime_is_reported_and_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = tmp_path / "crash.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(parity.session, "__file__", str(script))
    assert parity.run_onnxruntime([tmp_path / "model.onnx"], []) == (
        "ONNX Runtime ended by signal 11: it said nothing"
    )


def test_a_file_for_cuda_is_compared_on_the_cpu_where_no_cuda_runs_and_says_so(
    program: attnopt.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given: list[str] = []

    def run(files: Any, runs: Any, provider: str = "cpu") -> Any:
        given.append(provider)
        return [run.logits for run in runs]

    monkeypatch.setattr(parity, "run_onnxruntime", run)
    ((_, signature),) = signatures_of(program).values()
    call = (in_float32(program), program, {tmp_path / "model.onnx": signature}, 1)
    for here, provider in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(parity, "runs_here", lambda ep, here=here: here)
        found = parity.compare(*call, ep="cuda")
        assert (found.provider, found.accepted) == (provider, True)
        longer, *others = found.left_out
        assert longer == "longer calls: the model has 127 positions"
        assert ["compared on cpu" in told for told in others] == [True] * (not here)
        assert given.pop() == provider


def test_a_provider_that_does_not_run_is_told_from_one_that_does():
    assert runs_here("cpu")
    assert not runs_here("cuda") or Path("/dev/nvidiactl").exists()


def test_a_graph_that_fails_again_with_loose_sizes_is_refused(
    program: attnopt.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = iter(["Constraints violated (batch)!", "no such op\nmore"])

    def fail(*args: Any) -> Any:
        raise torch.onnx.errors.OnnxExporterError(next(told))

    monkeypatch.setattr(exporting, "_translated", fail)
    with pytest.raises(NotImplementedError, match=r"to ONNX: no such op$"):
        attnopt.export_onnx(program, tmp_path / "out")
    assert next(told, None) is None


def test_a_file_that_is_none_is_reported(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    told = parity.run_onnxruntime([tmp_path / "model.onnx"], [])
    assert isinstance(told, str)
    assert re.match("ONNX Runtime ended with status 1: .*(INVALID_PROTOBUF|Protobuf)", told)


class Attends(nn.Module):
    """Attention over tokens, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_sizes_that_the_source_cannot_run_at_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The captured sizes are compared, and nothing is claimed of others."""
    program = attnopt.capture(Attends().eval(), (torch.randn(2, 5, 8),))
    ((_, signature),) = signatures_of(program).values()
    model = in_float32(program)
    flat = model.flat
    length = signature.example()["x"].shape[1]

    def one_size(values: Any) -> Any:
        (x,) = (t for t in values.values() if isinstance(t, torch.Tensor) and t.dim() == 3)
        if x.shape[1] != length:
            raise RuntimeError(f"the table has no place {x.shape[1]}\nmore lines")
        return flat(values)

    @torch.no_grad()
    def echo(file: Path, calls: Any, outputs: list[str]) -> Any:
        return [
            dict(zip(outputs, flat(program.form.flatten((), call)), strict=True)) for call in calls
        ]

    monkeypatch.setattr(model, "flat", one_size)
    monkeypatch.setattr(parity, "run_onnxruntime_plainly", echo)
    found = parity.compare(model, program, {tmp_path / "model.onnx": signature}, steps=1)
    assert [c.case for c in found.cases] == ["the captured sizes"]
    assert found.left_out == (f"other sizes: the table has no place {2 * length}",)
    assert found.accepted
    assert found.content()["left_out"] == list(found.left_out)
    # A source that fails where it was captured is no matter of sizes.
    monkeypatch.setattr(model, "flat", lambda values: one_size({"x": torch.ones(1, 99, 8)}))
    with pytest.raises(RuntimeError, match="no place 99"):
        parity.compare(model, program, {tmp_path / "model.onnx": signature}, steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window": 3},
        {"window": 2, "right": 1},
        {"causal": True, "prefix": 3},
        {"causal": True, "chunk": 4},
        {"softcap": 2.0, "scale": 0.7},
        {"k_map": [0, 1, 1, 0], "v_map": [1, 0, 0, 1]},
    ],
    ids=str,
)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (5, 9)])
@pytest.mark.parametrize("extra", [(), ("padding",), ("mask", "bias"), ("padding", "sinks")])
def test_the_attention_of_the_file_is_the_reference(
    options: dict[str, Any], queries: int, keys: int, extra: tuple[str, ...]
):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 6), torch.randn(2, 2, keys, 6), torch.randn(2, 1, keys, 5)
    v = torch.randn(2, 2, keys, 5) if "v_map" in options else v
    masks = {
        "padding": torch.arange(keys).view(1, 1, 1, -1) >= torch.tensor([0, 4]).view(2, 1, 1, 1),
        "mask": torch.rand(2, 4, queries, keys) > 0.4,
        "bias": torch.randn(4, queries, keys),
        "sinks": torch.randn(4),
    }
    given = {**options, **{name: masks[name] for name in extra}}
    want = attention_reference(q, k, v, **given)[0]
    torch.testing.assert_close(attend(q, k, v, {}, **given), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--to", "gguf"], 2, "AO110 --to gguf is not served yet; there is onnx"),
        (["--to", "onnx", "--opset", "9"], 2, "opset 9; there is 18 to 23"),
        (["--to", "onnx", "--steps", "0"], 2, "--steps needs at least 1"),
        ([], 2, "--to"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    words: list[str], status: int, told: str, tmp_path: Path, capsys: Any
):
    assert main(["export", "cli_models:blocks", "-o", str(tmp_path / "out"), *words]) == status
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("AO")
    assert told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v2", "llama4_text"])
def test_rotary_embeddings_of_complex_numbers_are_exported(name: str, tmp_path: Path):
    model, kwargs, _ = zoo.build(name, "eager", task="lm")
    made = attnopt.export_onnx(attnopt.capture(model, (), kwargs), tmp_path / "out", steps=16)
    assert made.accepted, made.parity
    assert max(c.max_delta_logit for c in made.parity.cases) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cases"),
    [("t5", 4), ("bart", 3), ("whisper", 2)],
    ids=["any length", "few positions", "few positions and no mask"],
)
def test_an_encoder_decoder_becomes_two_files_on_the_same_weights(
    name: str, cases: int, tmp_path: Path
):
    model, kwargs, _ = zoo.build(name, "eager", task="lm", pad="right")
    made = attnopt.export_onnx(attnopt.capture(model, (), kwargs), tmp_path / "out", steps=16)
    assert made.accepted, made.parity
    assert [(c.equal, c.tokens) for c in made.parity.cases] == [(16, 16)] * cases
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == [
        "decode.onnx", "encode.onnx", "model.onnx.data",
    ]  # fmt: skip
    size = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "out/model.onnx.data").stat().st_size < 1.6 * size
    decode = onnx.load(tmp_path / "out/decode.onnx", load_external_data=False).graph
    assert {"past_key_values.0.decoder.key", "past_key_values.0.encoder.value"} <= {
        i.name for i in decode.input
    }
    assert not any("encoder" in o.name for o in decode.output)


@pytest.mark.slow
def test_first_tokens_in_streams_are_as_many_as_are_given(tmp_path: Path):
    model, kwargs, _ = zoo.build("prophetnet", "eager", task="lm", pad="right")
    made = attnopt.export_onnx(attnopt.capture(model, (), kwargs), tmp_path / "out", steps=4)
    assert made.accepted, made.parity
    inputs = onnx.load(made.paths[0], load_external_data=False).graph.input
    taken = next(i for i in inputs if i.name == "decoder_input_ids")
    assert [d.dim_param for d in taken.type.tensor_type.shape.dim] == ["batch", "size_2"]


def test_what_was_captured_module_by_module_is_refused(tmp_path: Path):
    program = attnopt.capture(decoder("llama_gqa"))
    parts = dataclasses.replace(program, parts={"layers.0": program})
    with pytest.raises(NotImplementedError, match="module by module"):
        attnopt.export_onnx(parts, tmp_path / "out")


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["export", "cli_models:blocks", "--to", "onnx", "-o", str(tmp_path / "out")]
    assert main(words) == 6
    err = capsys.readouterr().err
    assert err == (
        "AO603 ONNX export needs onnx, onnxscript, onnxruntime: pip install attnopt[onnx]\n"
    )


def test_a_folder_of_somebody_else_is_left_alone(program: attnopt.Program, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not write"):
        attnopt.export_onnx(program, tmp_path)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        pytest.param(
            "bert",
            {"input_ids", "attention_mask"},
            ["last_hidden_state", "pooler_output"],
            marks=pytest.mark.slow,
        ),
        ("vit", {"pixel_values"}, ["last_hidden_state", "pooler_output"]),
        pytest.param("clip_vision", {"pixel_values"}, None, marks=pytest.mark.slow),
        pytest.param("wav2vec2", None, None, marks=pytest.mark.slow),
        pytest.param("swin", {"pixel_values"}, None, marks=pytest.mark.slow),
        pytest.param("audio_spectrogram_transformer", None, None, marks=pytest.mark.slow),
        *(
            pytest.param(name, None, None, marks=pytest.mark.slow)
            for name in ("deberta", "xlnet", "modernbert", "nomic_bert")
        ),
        pytest.param("distilbert", None, ["last_hidden_state"], marks=pytest.mark.slow),
    ],
)
def test_a_model_without_a_cache_is_exported_as_its_source_is_called(
    name: str, inputs: set[str] | None, outputs: list[str] | None, tmp_path: Path
):
    model, kwargs, _ = zoo.build(name, "eager", pad="right")
    made = attnopt.export_onnx(attnopt.capture(model, (), kwargs), tmp_path / "out")
    assert made.accepted, made.parity
    assert [c.case for c in made.parity.cases] == ["the captured sizes", "other sizes"]
    assert max(c.max_delta_logit for c in made.parity.cases) < 1e-4
    graph = onnx.load(made.path, load_external_data=False).graph
    assert inputs is None or {i.name for i in graph.input} == inputs
    assert outputs is None or [o.name for o in graph.output] == outputs
    assert all(i.type.tensor_type.shape.dim[0].dim_param == "batch" for i in graph.input)


class Overlaps(nn.Module):
    """Pairs of neighbours, read by strides from a tensor that lies in memory the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        turned = self.linear(x).transpose(1, 2)
        sizes = (*turned.shape[:2], turned.shape[2] - 1, 2)
        return turned.as_strided(sizes, (*turned.stride(), turned.stride(2)))


@pytest.mark.slow
def test_strides_are_those_of_the_source_in_the_file(tmp_path: Path):
    program = attnopt.capture(Overlaps().eval(), (torch.randn(2, 6, 4),))
    made = attnopt.export_onnx(program, tmp_path / "out")
    assert made.accepted, made.parity
    assert [c.case for c in made.parity.cases] == ["the captured sizes", "other sizes"]


@pytest.mark.slow
@pytest.mark.parametrize("affine", [True, False])
def test_groups_are_normed_as_instances(affine: bool, tmp_path: Path):
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 6, affine=affine)
            for tensor in self.norm.parameters():
                nn.init.normal_(tensor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x * 2) + x

    program = attnopt.capture(Grouped(), (torch.randn(2, 6, 4, 5),))
    found = attnopt.export_onnx(program, tmp_path / "out")
    assert found.accepted
    kinds = [n.op_type for n in onnx.load(found.path).graph.node]
    assert "InstanceNormalization" in kinds
    assert "GroupNormalization" not in kinds


@pytest.mark.slow
def test_a_wrong_output_of_a_model_without_a_cache_is_rejected(tmp_path: Path, monkeypatch):
    model, kwargs, _ = zoo.build("bert", "eager", pad="right")
    program = attnopt.apply(attnopt.capture(model, (), kwargs), "exact")
    right = operators._PLAIN["Attention"]
    monkeypatch.setitem(operators._PLAIN, "Attention", lambda *a, **k: 1.001 * right(*a, **k))
    made = attnopt.export_onnx(program, tmp_path / "out")
    assert not made.accepted
    assert made.path == tmp_path / "out.rejected/model.onnx.rejected"


# Soft caps and windows, sinks, learned positions, ALiBi, unlike widths of keys and values.
FAMILIES = ("gemma2", "gpt_oss", "gpt2", "bloom", "deepseek_v3", "mistral", "falcon_mq")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_zoo_agrees_in_onnxruntime(name: str, tmp_path: Path):
    model, _, _ = zoo.build(name, task="lm", attn="eager")
    made = attnopt.export_onnx(attnopt.capture(model), tmp_path / "out", steps=24)
    assert made.accepted, made.parity


@pytest.mark.slow
def test_a_model_in_bfloat16_is_cast_and_says_so(tmp_path: Path):
    program = attnopt.capture(decoder("llama").to(torch.bfloat16))
    made = attnopt.export_onnx(program, tmp_path / "out", opset=23)
    assert (made.accepted, made.opset, made.dtype) == (True, 23, torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "mistral", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_model_runs_in_onnxruntime_from_python(name: str):
    task = "base" if name == "bert" else "lm"
    model, kwargs, _ = zoo.build(name, "eager", task=task, pad="left")
    program = attnopt.apply(attnopt.capture(model, (), kwargs), "exact")
    twin: Any = attnopt.lower(program, "ort")
    with torch.no_grad():
        want, got = model(**kwargs), twin(**kwargs)
    assert type(got) is type(want)
    valid = kwargs["attention_mask"].bool()
    torch.testing.assert_close(got[0][valid], want[0][valid], rtol=0, atol=1e-5)
    if task == "lm":
        way = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        given = {n: kwargs[n] for n in ("input_ids", "attention_mask")}
        assert torch.equal(twin.generate(**given, **way), model.generate(**given, **way))


def test_onnxruntime_runs_in_float32_only(program: attnopt.Program):
    twin = attnopt.lower(program, "ort").half()
    with pytest.raises(ValueError, match="runs in float32"):
        twin(input_ids=torch.zeros(1, 3, dtype=torch.long))
