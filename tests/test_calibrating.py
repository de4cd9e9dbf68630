"""Statistics are those of the inputs themselves; a stopped calibration goes on as if it had not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import decoder, exactly, ids

import attnopt
from attnopt.calibrating import Statistics
from attnopt.program import Program
from attnopt.resuming import Workplace
from attnopt.running import Run
from attnopt.tensorfiles import TensorFile

LAYER = "model.layers.1.self_attn."
O = f"{LAYER}o_proj.weight"  # noqa: E741


@pytest.fixture(scope="module")
def model() -> Any:
    return decoder("llama_gqa")


@pytest.fixture(scope="module")
def program(model: Any) -> Program:
    return exactly(model)


def batches() -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    return [{"input_ids": ids(3, 9, seed=1), "attention_mask": mask}, {"input_ids": ids(2, 13)}]


def inputs_of(model: Any, name: str, calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Return what a module of the source is given, call by call."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, given, __: seen.append(given[0])
    )
    for call in calls:
        model(**call)
    hook.remove()
    return [x.double() for x in seen]


def counted(calls: list[dict[str, Any]], seen: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows that count: without padding and without the first token."""
    rows: list[torch.Tensor] = []
    for call, x in zip(calls, seen, strict=True):
        mask = call.get("attention_mask", torch.ones_like(call["input_ids"]))
        for row, own in zip(x, mask.bool(), strict=True):
            rows.append(row[own][1:])
    return torch.cat(rows)


@pytest.mark.parametrize("more", [0, 6])
def test_statistics_are_those_of_the_inputs(program: Program, model: Any, more: int) -> None:
    """With few rows (kept whole) and with more than there are channels (kept as a moment)."""
    calls = [*batches(), *({"input_ids": ids(2, 9, seed=9 + i)} for i in range(more))]
    stats = attnopt.calibrate(program, calls)
    x = counted(calls, inputs_of(model, LAYER + "o_proj", calls))
    kept = stats.rows(O)
    assert (kept is None) == (len(x) > 32)
    if kept is not None:
        assert torch.allclose(kept.double(), x, atol=1e-5)
    longer = torch.cat([x, torch.ones(len(x), 1)], 1)
    assert torch.allclose(stats.gram(O), longer.T @ longer / len(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(stats.absolute(O), x.abs().mean(0), rtol=1e-4, atol=1e-6)
    weight = model.get_parameter(O).double()
    heads = program.sites[1].heads
    parts = x.view(len(x), heads, -1), weight.view(len(weight), heads, -1)
    each = torch.einsum("thd,ohd->tho", *parts).abs().sum(-1).mean(0)
    assert torch.allclose(stats.contribution(O), each, rtol=1e-4)
    assert stats.tokens == len(x)


def test_tokens_in_rows_without_batches_are_counted_alike() -> None:
    """GPT-2 multiplies with one row for each token of all texts."""
    model = decoder("gpt2")
    stats = attnopt.calibrate(exactly(model), batches())
    place = "transformer.h.1.attn.c_proj"
    seen = inputs_of(model, place, batches())
    x = counted(batches(), seen)
    longer = torch.cat([x, torch.ones(len(x), 1)], 1)
    gram = stats.gram(f"{place}.weight")
    assert torch.allclose(gram, longer.T @ longer / len(x), rtol=1e-4, atol=1e-5)
    count, mean = stats.first(f"{place}.weight")
    norms = [seen[0][0, 4], seen[0][1, 0], seen[0][2, 0], seen[1][0, 0], seen[1][1, 0]]
    assert (count, mean) == (5, pytest.approx(float(torch.stack(norms).norm(dim=1).mean()), 1e-4))


def test_the_first_token_is_kept_apart(program: Program, model: Any) -> None:
    stats = attnopt.calibrate(program, batches())
    first, second = inputs_of(model, LAYER + "o_proj", batches())
    norms = [first[0, 4], first[1, 0], first[2, 0], second[0, 0], second[1, 0]]
    count, mean = stats.first(O)
    assert count == 5
    assert mean == pytest.approx(float(torch.stack(norms).norm(dim=1).mean()), rel=1e-4)


def test_keys_and_values_share_the_statistics_of_their_input(program: Program) -> None:
    stats = attnopt.calibrate(program, batches())
    names = [f"{LAYER}{x}_proj.weight" for x in "qkv"]
    assert torch.equal(stats.gram(names[0]), stats.gram(names[2]))
    assert len({stats.owners[name] for name in names}) == 1
    with pytest.raises(KeyError, match="no output projection"):
        stats.contribution(names[0])
    with pytest.raises(KeyError, match="no statistics of nothing"):
        stats.gram("nothing")


def test_what_an_mlp_multiplies_last_is_calibrated_too(program: Program, model: Any) -> None:
    name = "model.layers.0.mlp.down_proj"
    stats = attnopt.calibrate(program, batches())
    x = counted(batches(), inputs_of(model, name, batches()))
    assert torch.allclose(stats.absolute(f"{name}.weight"), x.abs().mean(0), rtol=1e-4)


def test_nothing_is_computed_beyond_the_last_input(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watched(monkeypatch)
    attnopt.calibrate(program, batches())
    assert not any("layers.1.mlp.down" in name or "lm_head" in name for name in read)
    assert any("layers.0.mlp.down" in name for name in read)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the modules whose nodes are run."""
    seen: list[str] = []
    run_node = Run.run_node

    def noting(self: Run, n: Any) -> Any:
        if n.op != "placeholder":
            seen.append(" ".join(path for path, _ in n.meta.get("nn_module_stack", {}).values()))
        return run_node(self, n)

    monkeypatch.setattr(Run, "run_node", noting)
    return seen


def test_statistics_on_disk_are_those_in_memory(program: Program, tmp_path: Path) -> None:
    calls = [*batches(), {"input_ids": ids(3, 15, seed=7)}]
    here, there = attnopt.calibrate(program, calls), attnopt.calibrate(program, calls, tmp_path)
    assert isinstance(there.tensors, TensorFile)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.safetensors"]
    for parameter in here.owners:
        assert torch.allclose(here.gram(parameter), there.gram(parameter), rtol=1e-9)
    assert torch.equal(here.contribution(O), there.contribution(O))
    there.save(tmp_path / "again.safetensors")
    again = Statistics.load(tmp_path / "again.safetensors", program.weights)
    assert torch.equal(again.gram(O), there.gram(O))
    assert again.tokens == here.tokens


class Stopped(Exception):  # noqa: N818
    """What stands for a power cut."""


@pytest.mark.parametrize("after", range(6))
def test_a_stopped_calibration_goes_on_and_gives_the_same_bits(
    after: int, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [*batches(), {"input_ids": ids(3, 15, seed=7)}]
    whole = tmp_path / "whole.safetensors"
    attnopt.calibrate(program, calls, whole)
    written = 0

    def stopping(method: Any) -> Any:
        def write(self: Workplace, *given: Any) -> None:
            nonlocal written
            if written == after:
                raise Stopped
            written += 1
            method(self, *given)

        return write

    place = tmp_path / "place.safetensors"
    with monkeypatch.context() as patched:
        for name in ("pause", "finish", "remove"):
            patched.setattr(Workplace, name, stopping(getattr(Workplace, name)))
        with pytest.raises(Stopped):
            attnopt.calibrate(program, calls, place)
    assert place.exists() == (after == 5)
    read = watched(monkeypatch)
    attnopt.calibrate(program, calls, place)
    assert place.read_bytes() == whole.read_bytes()
    assert any("layers.0.self_attn" in name for name in read) == (after < 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["place.safetensors", "whole.safetensors"]


def test_finished_statistics_are_read_and_not_made_again(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attnopt.calibrate(program, batches(), tmp_path)
    read = watched(monkeypatch)
    again = attnopt.calibrate(program, batches(), tmp_path)
    assert not read
    assert torch.equal(first.gram(O), again.gram(O))
    assert len(again.batches) == 2


def test_statistics_of_others_are_refused(program: Program, tmp_path: Path) -> None:
    attnopt.calibrate(program, batches(), tmp_path)
    with pytest.raises(ValueError, match="of other data"):
        attnopt.calibrate(program, batches()[:1], tmp_path)
    changed = program.with_weights({O: program.weights[O] + 1})
    with pytest.raises(ValueError, match="of another model"):
        attnopt.calibrate(changed, batches(), tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="no safetensors file"):
        attnopt.calibrate(program, batches(), tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == b"mine"


def test_two_calibrations_do_not_share_a_place(program: Program, tmp_path: Path) -> None:
    place = tmp_path / "statistics.safetensors"
    with (
        Workplace(place, {"data": "mine"}),
        pytest.raises(ValueError, match="another process is calibrating"),
    ):
        attnopt.calibrate(program, batches(), place)
    with pytest.raises(ValueError, match="partial has statistics of another model"):
        attnopt.calibrate(program, batches(), place)


def test_rows_of_one_token_are_refused(program: Program) -> None:
    with pytest.raises(ValueError, match="longer rows"):
        attnopt.calibrate(program, ids(4, 1))


def test_a_refit_sees_the_stream_that_rows_without_batches_are_added_to() -> None:
    """Moments of the new input with the old one, and with how far the streams are apart."""
    program = exactly(decoder("gpt2"))
    stats = attnopt.calibrate(program, batches())
    attnopt.apply(program, attnopt.plan(program, {"params": 0.9}, statistics=stats, tier=0))
    pairs = dict(stats.refits)
    assert pairs
    for name, (gram, cross) in pairs.items():
        weight = program.weights[name.split("/")[-1]]
        assert cross.shape == (len(gram), sum(weight.shape)), name
