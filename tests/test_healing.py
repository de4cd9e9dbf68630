"""Healing: it starts where the rewrite left off, brings the program closer, and can be resumed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import healing_worker
import pytest
import torch
import transformers
from dha_models import captured, decoder, ids, repeat_heads
from safetensors.torch import load_file
from torch import Tensor

import attnopt
from attnopt import debug
from attnopt.data import Source, Split, split_of
from attnopt.healing import Healing, Interrupted, Recipe, healed
from attnopt.healing.functional import Functional, wide_weights
from attnopt.healing.objectives import distance, divergence, surprise
from attnopt.healing.regions import cut, regions_of
from attnopt.healing.rows import Deal, rows_of
from attnopt.healing.training import Stage
from attnopt.nouns import Choice
from attnopt.program import Program
from attnopt.verifying import losses


def repeated(family: str = "llama") -> torch.nn.Module:
    """Return a decoder whose heads are equal in pairs, with a distribution of its own."""
    model = decoder(family)
    repeat_heads(model, 2)
    torch.manual_seed(4)
    model.lm_head.weight.normal_(0, 0.5)
    return model


@cache
def pair(family: str = "llama") -> tuple[Program, Program]:
    """Return a student with half of the key and value heads, and its teacher."""
    return fused(repeated(family))


def fused(model: torch.nn.Module) -> tuple[Program, Program]:
    """Fuse heads, which loses nothing here, and disturb what came of it: it can be mended."""
    teacher, stats = captured(model)
    choices = tuple(Choice(s.name, "dha", {"kv_heads": 2}) for s in teacher.sites)
    student = attnopt.apply(teacher, attnopt.Plan(choices, statistics=stats))
    torch.manual_seed(6)
    names = sorted(n for n in parameters(student) if ".self_attn." in n)
    shaken = {n: student.weights[n] + NOISE * torch.randn(student.weights[n].shape) for n in names}
    old = {n: student.weights[n].dtype for n in names}
    return student.with_weights({n: x.to(old[n]) for n, x in shaken.items()}), teacher


NOISE = 0.03
HELD = 32


@cache
def data(family: str = "llama", rows: int = 160, tokens: int = 12) -> Split:
    """Return text that the teacher wrote."""
    return written(repeated(family), rows, tokens)


def written(model: torch.nn.Module, rows: int, tokens: int) -> Split:
    torch.manual_seed(5)
    found = model.generate(
        ids(rows + HELD, 1), max_length=tokens, min_length=tokens, do_sample=True, top_k=0
    )
    return Split(found[:rows], found[rows:], "written", "")


def gap(program: Program, teacher: Program) -> float:
    """Return the distance of the logits to the teacher's, relative to their size."""
    inputs = {"input_ids": ids(6, 13, seed=11)}
    a, b = (p(**inputs).logits.double() for p in (program, teacher))
    return float((a - b).norm() / b.norm())


def parameters(program: Program) -> dict[str, Tensor]:
    names = {b.name for b in program.bindings.values() if b.kind == "parameter"}
    return {name: program.weights[name] for name in names}


def run(steps: int = 12, **settings: object) -> Healing:
    checkpoint = settings.pop("checkpoint", None)
    resume = bool(settings.pop("resume", False))
    recipe = Recipe(steps, **{"batch": 4, "every": 4, "patience": 99, **settings})
    return healed(*pair(), data(), recipe, checkpoint=checkpoint, resume=resume)


@pytest.mark.parametrize("family", ["llama", "qwen2", pytest.param("glm", marks=pytest.mark.slow)])
def test_a_healed_program_is_closer_to_its_teacher(family: str) -> None:
    student, teacher = pair(family)
    before = parameters(student)
    settings = {"lr": 3e-3, "site_lr": 3e-3, "every": 20}
    result = attnopt.heal(student, teacher, data(family), steps=40, **settings)
    assert gap(result, teacher) < 0.8 * gap(student, teacher)
    assert "heal: 40 steps" in result.history[-1]
    assert parameters(student).keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in parameters(student).items())


def test_only_what_the_rewrite_changed_is_changed() -> None:
    student, _ = pair()
    after = parameters(run(site_steps=4).program)
    moved = {n for n, x in parameters(student).items() if not torch.equal(x, after[n])}
    assert moved == {n for n in after if ".self_attn." in n}
    assert len(moved) == 8


def test_the_first_loss_is_that_of_the_rewritten_program() -> None:
    student, teacher = pair()
    result, split = run(4), data()
    watched, judged = split.held_out[HELD // 2 :], split.held_out[: HELD // 2]
    expected = losses(student, watched, "watched")
    assert result.looks[0]["step"] == 0
    assert result.looks[0]["loss"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert torch.allclose(result.before.nll, losses(student, judged, "judged"), atol=1e-6)
    assert torch.allclose(result.before.reference_nll, losses(teacher, judged, "t"), atol=1e-6)
    assert torch.allclose(result.after.nll, losses(result.program, judged, "after"), atol=1e-6)


def test_the_tokens_seen_are_counted() -> None:
    result = run(6, accumulate=2, site_steps=2)
    assert (result.steps, result.tokens) == (6, 6 * 2 * 4 * 12)
    assert [len(x) for x in result.losses.values()] == [2, 4]


def test_a_low_rank_change_is_merged() -> None:
    _, teacher = pair()
    torch.manual_seed(8)
    names = sorted(n for n in parameters(teacher) if "o_proj" in n or "q_proj" in n)
    damage = {n: torch.outer(*torch.randn(2, 32)) * 0.1 for n in names}
    student = teacher.with_weights({n: teacher.weights[n] + x for n, x in damage.items()})
    recipe = Recipe(60, rank=2, lr=3e-3, site_lr=1e-2, every=20)
    result = healed(student, teacher, data(), recipe)
    before, after = parameters(student), parameters(result.program)
    changes = {n: after[n] - x for n, x in before.items() if not torch.equal(after[n], x)}
    assert sorted(changes) == names
    assert all(torch.linalg.matrix_rank(x.double(), rtol=1e-4) <= 2 for x in changes.values())
    assert gap(result.program, teacher) < 0.9 * gap(student, teacher)
    assert result.learned == len(names) * 2 * (32 + 32)


def test_tied_weights_stay_one() -> None:
    model = decoder("llama")
    model.config.tie_word_embeddings = True
    model.model.embed_tokens.weight.normal_(0, 0.5)
    model.tie_weights()
    teacher = attnopt.apply(attnopt.capture(model, (), {"input_ids": ids(2, 11)}), "exact")
    (group,) = teacher.source.tied
    tied = teacher.weights[group[0]] + 0.1 * torch.randn(61, 32)
    student = teacher.with_weights(dict.fromkeys(group, tied))
    recipe = Recipe(16, train="all", lr=3e-3, every=8)
    result = healed(student, teacher, written(model, 64, 12), recipe)
    assert result.best_at
    now = [result.program.weights[name] for name in group]
    assert all(torch.equal(x, now[0]) for x in now)
    assert not torch.equal(now[0], tied)
    assert result.learned == sum(p.numel() for p in model.parameters())


def test_a_source_of_half_precision_is_given_back_in_half_precision() -> None:
    student, teacher = fused(repeated().to(torch.bfloat16))
    recipe = Recipe(12, batch=4, dtype="bfloat16", every=12)
    result = healed(student, teacher, data(), recipe)
    assert {x.dtype for x in parameters(result.program).values()} == {torch.bfloat16}
    judged = data().held_out[: HELD // 2]
    assert torch.allclose(result.after.nll, losses(result.program, judged, "after"), atol=1e-6)


def test_site_by_site_no_gradient_passes_from_one_layer_to_another() -> None:
    student, teacher = pair()
    device = torch.device("cpu")
    changed = [n for n, x in parameters(student).items() if ".self_attn." in n]
    pieces = cut(student, teacher, regions_of(student, changed))
    assert not pieces.skipped
    assert len(pieces.regions) == 2
    batch = {"input_ids": ids(3, 9)}
    values = Functional.of(pieces.teacher, device).flat(batch, wide_weights(teacher, device))
    given = dict(zip(pieces.inputs, values, strict=False))
    weights = wide_weights(student, device)
    for name in parameters(student):
        weights[name].requires_grad_()
    outputs = Functional.of(pieces.student, device).flat(batch, weights, given)
    outputs[1].square().sum().backward()
    reached = {n for n, x in weights.items() if x.grad is not None and bool(x.grad.any())}
    assert reached == set(pieces.regions[1].parameters)


def windowed(teacher: Program) -> Program:
    choice = Choice(teacher.sites[1].name, "window", {"window": 3, "first": 1})
    return attnopt.apply(teacher, attnopt.Plan((choice,)))


def test_a_site_whose_op_was_replaced_is_healed_though_its_weights_are_the_same() -> None:
    _, teacher = pair()
    student = windowed(teacher)
    assert all(torch.equal(x, parameters(student)[n]) for n, x in parameters(teacher).items())
    recipe = Recipe(60, site_steps=40, batch=16, lr=3e-3, site_lr=1e-2, every=20)
    result = healed(student, teacher, data(), recipe)
    lost = result.losses["sites"]
    assert sum(lost[-5:]) < 0.97 * sum(lost[:5])
    assert result.after.delta_nll.mean < result.before.delta_nll.mean
    after = parameters(result.program)
    moved = {n for n, x in parameters(teacher).items() if not torch.equal(x, after[n])}
    assert moved == {n for n in after if ".1.self_attn." in n}
    assert result.program.grown is not None


def test_parameters_inside_a_site_learn_with_it() -> None:
    _, teacher = pair("qwen2")
    student = windowed(teacher)
    pieces = cut(student.growing, teacher, regions_of(student.growing, (), teacher))
    (region,) = pieces.regions
    assert set(region.parameters) == {n for n in parameters(teacher) if ".1.self_attn." in n}
    assert {n.rsplit(".", 2)[1] for n in region.inside} == {"q_proj", "k_proj", "v_proj"}
    assert all(n.endswith(".bias") for n in region.inside)


def test_a_source_as_it_was_written_has_no_other_ops_than_its_exact_form() -> None:
    exact = pair()[1]
    raw = attnopt.capture(repeated(), (), {"input_ids": ids(2, 11)})
    assert not regions_of(exact, (), raw)
    with pytest.raises(ValueError, match="nothing that the rewrite changed"):
        attnopt.heal(exact, raw, data(), steps=2)


def test_a_teacher_is_at_no_distance_from_itself() -> None:
    _, teacher = pair()
    device = torch.device("cpu")
    pieces = cut(teacher, teacher, regions_of(teacher, list(parameters(teacher))))
    batch, weights = {"input_ids": ids(3, 9)}, wide_weights(teacher, device)
    values = Functional.of(pieces.teacher, device).flat(batch, weights)
    given = dict(zip(pieces.inputs, values, strict=False))
    ours = Functional.of(pieces.student, device).flat(batch, weights, given)
    assert float(distance(ours, values[len(pieces.inputs) :], batch)) < 1e-12


def test_the_first_stage_alone_brings_every_site_closer() -> None:
    result = run(40, site_steps=40, site_lr=3e-3)
    found = result.losses["sites"]
    assert found[-1] < 0.9 * found[0]
    assert not result.losses["distil"]


def test_the_divergence_is_that_of_the_definition() -> None:
    ours, theirs = torch.randn(2, 3, 5, 11, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids(3, 5)}
    expected = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    )
    assert torch.allclose(divergence(ours, theirs, inputs), expected.sum(-1).mean(1))
    assert torch.allclose(divergence(ours, theirs, inputs, top_k=11), expected.sum(-1).mean(1))
    assert float(divergence(theirs, theirs, inputs, top_k=3, temperature=3.0).max()) < 1e-6
    # What only moves tokens out of the teacher's top does not count.
    low = theirs.argmin(-1, keepdim=True)
    moved = theirs.scatter_add(-1, low, torch.full_like(low, -5, dtype=torch.float32))
    assert float(divergence(moved, theirs, inputs, top_k=3).max()) < 1e-6
    assert float(divergence(moved, theirs, inputs).min()) > 1e-3


def test_padding_does_not_count() -> None:
    logits = torch.randn(2, 4, 61, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    inputs = {"input_ids": ids(2, 4), "attention_mask": mask}
    other = {**inputs, "input_ids": inputs["input_ids"] * mask}
    assert torch.equal(surprise(logits, inputs), surprise(logits, other))
    changed = logits.clone()
    changed[0, 3] += torch.randn(61, generator=torch.Generator().manual_seed(1))
    assert torch.equal(divergence(changed, logits, inputs), torch.zeros(2))


def test_every_row_is_seen_once_an_epoch() -> None:
    deal = Deal(7, seed=3)
    assert sorted(deal.between(0, 7).tolist()) == sorted(deal.between(7, 14).tolist())
    assert deal.between(0, 7).tolist() != deal.between(7, 14).tolist()
    parts = torch.cat([deal.between(i, i + 4) for i in range(0, 20, 4)])
    assert torch.equal(parts, deal.between(0, 20))


def test_the_rate_rises_and_falls() -> None:
    recipe = Recipe(100, warmup=0.1, floor=0.2)
    stage = Stage("distil", 100, 1.0, {}, lambda batch: torch.zeros(()))
    rates = [stage.rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)


def test_it_stops_when_the_gate_is_met() -> None:
    result = run(400, max_drop=10.0, every=2)
    assert result.steps == 0
    assert "gate was met" in result.stopped
    assert result.after.accepted


def test_it_stops_when_nothing_gets_better_and_keeps_the_best() -> None:
    result = run(60, lr=0.5, every=2, patience=2, site_steps=0)
    assert result.steps < 60
    assert "no better weights" in result.stopped
    best = min(result.looks, key=lambda look: look["loss"])
    assert result.best_at == best["step"]
    assert result.looks[-1]["loss"] > best["loss"]
    student, _ = pair()
    if result.best_at == 0:
        after = parameters(result.program)
        assert all(torch.equal(x, after[n]) for n, x in parameters(student).items())


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    first, again, other = run(), run(), run(seed=1)
    a, b, c = (parameters(x.program) for x in (first, again, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


class StoppedError(Exception):
    pass


def stop_at(stage: str, step: int, how: object) -> debug.Listener:
    def listen(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, step):
            how()

    return listen


def killed() -> None:
    raise StoppedError


@pytest.mark.parametrize(
    ("stage", "step"), [("sites", 2), ("sites", 5), ("distil", 1), ("distil", 7)]
)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_that_was_killed_is_resumed_bit_for_bit(
    stage: str, step: int, rank: int | None, tmp_path: Path
) -> None:
    settings = {"site_steps": 5, "every": 3, "rank": rank, "checkpoint": tmp_path / "run"}
    whole = run(13, **{**settings, "checkpoint": None})
    with debug.listening(stop_at(stage, step, killed)), pytest.raises(StoppedError):
        run(13, **settings)
    # Killed in the second step, it left nothing to resume: then it starts anew.
    assert (tmp_path / "run").exists() == ((stage, step) != ("sites", 2))
    again = run(13, **settings, resume=(tmp_path / "run").exists())
    assert_same(again, whole)


def test_ctrl_c_ends_the_step_and_can_be_resumed(tmp_path: Path) -> None:
    settings = {"site_steps": 3, "checkpoint": tmp_path / "run"}
    whole = run(12, site_steps=3)
    press = stop_at("distil", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with debug.listening(press), pytest.raises(Interrupted, match="after step 5 of 12"):
        run(12, **settings)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "healing.json",
        "healing.safetensors",
    }
    with pytest.raises(ValueError, match="was interrupted: resume it"):
        run(12, **settings)
    with pytest.raises(ValueError, match="another recipe"):
        run(13, **settings, resume=True)
    assert_same(run(12, **settings, resume=True), whole)
    # What is finished is not done again.
    with debug.listening(lambda *step: killed()):
        assert_same(run(12, **settings, resume=True), whole)


def assert_same(a: Healing, b: Healing) -> None:
    assert a.content() == b.content()
    before, after = parameters(a.program), parameters(b.program)
    assert all(torch.equal(x, after[n]) for n, x in before.items())


def test_a_broken_checkpoint_is_told(tmp_path: Path) -> None:
    run(4, checkpoint=tmp_path / "run")
    (tmp_path / "run/healing.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="no run that can be resumed"):
        run(4, checkpoint=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="holds no interrupted run"):
        run(4, checkpoint=tmp_path / "none", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something else"):
        run(4, checkpoint=tmp_path / "mine")


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"steps": 0}, ValueError, "steps 0 must be at least 1"),
        ({"steps": 4, "lr": 0.0}, ValueError, "lr 0.0 must be above 0"),
        ({"steps": 4, "added_lr": 0.0}, ValueError, "added_lr 0.0 must be above 0"),
        ({"steps": 4, "train": "some"}, ValueError, "changed, sites, all"),
        ({"steps": 4, "site_steps": 5}, ValueError, "more than all steps"),
        ({"steps": 4, "learning_rate": 1.0}, TypeError, "no setting 'learning_rate'"),
        ({"steps": 4, "dtyp": "float32"}, TypeError, "did you mean 'dtype'"),
    ],
)
def test_wrong_settings_are_told(settings: dict, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        attnopt.heal(*pair(), data(), **settings)


def test_a_program_that_is_its_teacher_has_nothing_to_heal() -> None:
    _, teacher = pair()
    with pytest.raises(ValueError, match="nothing that the rewrite changed"):
        attnopt.heal(teacher, teacher, data(), steps=2)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 5, dtype=torch.long), 7, {"input_ids": [1, 2]}])
def test_data_that_are_no_rows_are_told(wrong: object) -> None:
    with pytest.raises((ValueError, TypeError), match="rows"):
        rows_of(wrong, None)


def test_rows_to_learn_from_watch_and_judge_by_are_three_sets() -> None:
    found = rows_of(torch.arange(40).view(20, 2), None)
    parts = [x["input_ids"][:, 0].tolist() for x in (found.learned, found.watched, found.judged)]
    assert sorted(i for part in parts for i in part) == list(range(0, 40, 2))
    assert [len(x) for x in parts] == [15, 2, 3]


def test_a_module_without_text_is_distilled_by_its_outputs() -> None:
    from cli_models import TOKENS, WIDTH, Blocks

    torch.manual_seed(0)
    model = Blocks().eval().requires_grad_(False)
    teacher = attnopt.apply(attnopt.capture(model, (torch.rand(2, TOKENS, WIDTH),)), "exact")
    torch.manual_seed(1)
    changed = {n: x + 0.1 * torch.randn_like(x) for n, x in parameters(teacher).items()}
    student = teacher.with_weights({n: x for n, x in changed.items() if n.startswith("blocks.1")})
    rows = {"x": torch.rand(64, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))}
    result = healed(student, teacher, rows, Recipe(60, batch=16, lr=3e-3, every=20))
    assert float(result.after.nll.mean()) < 0.5 * float(result.before.nll.mean())
    assert result.before.base == 0


def test_two_processes_do_what_one_does_with_the_double_batch(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("healing_worker.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *torchrun, script, str(tmp_path)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        timeout=240,
        check=True,
    )
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("first", "second"))
    told = [(tmp_path / f"{n}.txt").read_text() for n in ("first", "second")]
    one = healing_worker.run(4)
    assert told[0] == told[1]
    assert int(told[0].split()[0]) == one.tokens
    before = parameters(healing_worker.pair()[0])
    for name, weight in parameters(one.program).items():
        assert torch.equal(first[name], second[name])
        moved = float((weight - before[name]).abs().max())
        assert float((first[name] - weight).abs().max()) <= 1e-3 * moved


@pytest.mark.slow
def test_the_bundled_checkpoint_is_healed_to_less_than_half_in_a_few_steps() -> None:
    folder = Path(__file__).parents[1] / "examples" / "models" / "code-llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    teacher = attnopt.apply(attnopt.capture(folder), "exact")
    stats = attnopt.calibrate(teacher, split_of(Source("stdlib", 48, 256), tokenizer))
    choices = tuple(Choice(s.name, "dha", {"kv_heads": 2}) for s in teacher.sites)
    student = attnopt.apply(teacher, attnopt.Plan(choices, statistics=stats))
    rows = split_of(Source("stdlib", 512, 256, seed=1), tokenizer, held_out=24)
    recipe = Recipe(50, site_steps=40, lr=5e-4, site_lr=4e-3, dtype="bfloat16", every=50)
    result = healed(student, teacher, rows, recipe)
    assert result.before.delta_nll.mean > 0.3
    assert result.left < 0.5, result.content()
    assert json.loads(json.dumps(result.content()))["steps"] == 50
    assert replace(result.after, max_drop=0.15).accepted
