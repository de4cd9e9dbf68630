"""What agents cost a classifier, before and after healing, and what they save a processor.

python tests/bench/agent.py
python tests/bench/agent.py --steps 400 --side 128

The bundled vit-digits is rewritten at every layer: with one sharpness for all (plain), fitted on
calibration data (fitted), and in the trained form, healed. It is judged by the 360 held-out digits
and learns from the others. Attention alone is timed on a square grid against dense
scaled_dot_product_attention, and a random block of a diffusion model (diffusers' DiT) is timed step
by step: it uses agents at the first time steps of a sampler, and none at the last.
"""

import argparse
import sys
import warnings
from typing import Any

import torch
import transformers
from digits import classifier, digits, grid_tokens, judged, taught
from harness import as_row, compare, write
from torch.nn import functional

import attnopt
from attnopt.nouns import Choice
from attnopt.ops import agent_attention_reference
from attnopt.ops.through_agents import attend_agents
from attnopt.rewriting import settled

AGENTS = (64, 16, 4)
CALIBRATED = 64  # pictures
HEADS, WIDTH = 4, 64
SETTINGS = {
    "plain": {"exponent": 0.3, "shortcut": [0.075]},
    "nystrom": {"exponent": 0.3, "shortcut": [0.075], "nystrom": True, "ridge": 1e-4},
}
SWITCH = 400  # the time step from which on agents are used; samplers go down from 1000
STEPS = (900, 100)


def main(arguments: list[str] | None = None) -> int:
    """Measure the classifier, then attention alone, then the schedule, and print all."""
    options = _options(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for part in (_classifier, _attention, _schedule):
        if part.__name__[1:] in options.only:
            rows += part(options)
    if not options.dry:
        write("agent", rows)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["classifier", "attention", "schedule"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--agents", type=int, nargs="+", default=list(AGENTS))
    parser.add_argument("--steps", type=int, default=200, help="of healing; 0 heals nothing")
    parser.add_argument("--side", type=int, default=64, help="of the grid that is timed")
    parser.add_argument("--latent", type=int, default=64, help="side of what the DiT is given")
    parser.add_argument("--rounds", type=int, default=60, help="of timing, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no results")
    return parser.parse_args(arguments)


# -------------------------------------------------------------------------------------- classifier


def _classifier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the accuracy at each number of agents, without training and healed."""
    teacher = classifier()
    learnt, held = digits()
    data = {"pixel_values": learnt["pixel_values"][:CALIBRATED]}
    statistics = attnopt.calibrate(teacher, data)
    rows: list[dict[str, Any]] = []
    for agents in options.agents:
        configs = {
            "plain": {"core": "plain", "exponent": 0.3, "shortcut": 0.075},
            "fitted plain": {"core": "plain"},
            "fitted": {},
        }
        for name, config in configs.items():
            choices = tuple(Choice(s.name, "agent", {"agents": agents, **config})
                            for s in teacher.sites)  # fmt: skip
            plan = settled(teacher, attnopt.Plan(choices, statistics=statistics))
            student = attnopt.apply(teacher, plan)
            row = {"what": "vit-digits", "form": name, "agents": agents}
            rows.append(row | judged(student, teacher, held) | _said(plan))
            print(rows[-1], flush=True)
        if options.steps:
            rows.append(_healed(teacher, agents, statistics, learnt, held, options))
            print(rows[-1], flush=True)
    return rows


def _said(plan: attnopt.Plan) -> dict[str, Any]:
    return {
        "cores": [c.config["core"] for c in plan.choices],
        "exponents": [c.config["exponent"] for c in plan.choices],
        "why": [c.why for c in plan.choices if c.why],
    }


def _healed(
    teacher: Any,
    agents: int,
    statistics: Any,
    learnt: dict[str, Any],
    held: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the accuracy of the trained form before and after it learns."""
    config = {"agents": agents, "mode": "trained"}
    choices = tuple(Choice(s.name, "agent", config) for s in teacher.sites)
    student = attnopt.apply(teacher, attnopt.Plan(choices, statistics=statistics))
    row = {"what": "vit-digits", "form": "trained", "agents": agents}
    return row | judged(student, teacher, held) | taught(student, teacher, learnt, held, options)


# --------------------------------------------------------------------------------------- attention


def _attention(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return how fast attention through agents is against dense attention, by their number."""
    side = options.side
    (q, k, v), generator = grid_tokens(side, options.seed, HEADS, WIDTH)
    weights = 0.02 * torch.randn(HEADS * WIDTH, 1, 3, 3, generator=generator)
    rows: list[dict[str, Any]] = []
    for agents in (16, 64, 256):
        one = round(agents**0.5)
        tables = 0.02 * torch.randn(2, HEADS, agents, 7, 7, generator=generator)
        trained = {"collect": [tables[0]], "spread": [tables[1]], "filter": weights}
        for form, settings in {**SETTINGS, "trained": trained}.items():
            base = {"grid": [side, side], "agents": [one, one]}
            rows.append(_timed(q, k, v, {**base, **settings}, options.rounds) | {"form": form})
            print(rows[-1], flush=True)
    return rows


def _timed(q: Any, k: Any, v: Any, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    found = attend_agents(q, k, v, **settings)
    wide = {n: _wide(x) for n, x in settings.items()}
    wanted = agent_attention_reference(q.double(), k.double(), v.double(), **wide)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < (1e-2 if settings.get("nystrom") else 1e-4), error
    calls = {
        "dense": lambda: functional.scaled_dot_product_attention(q, k, v),
        "agents": lambda: attend_agents(q, k, v, **settings),
    }
    with torch.no_grad():
        timing = compare(calls, base="dense", most=rounds)
    return {
        "what": "attention",
        "tokens": q.shape[2],
        "agents": settings["agents"][0] * settings["agents"][1],
        "error": error,
        "ms": {name: round(1e3 * timing.median(name), 3) for name in calls},
        "speedup": as_row(timing.speedup("agents", "dense")),
    }


def _wide(x: Any) -> Any:
    if isinstance(x, list) and isinstance(x[0], torch.Tensor):
        return [t.double() for t in x]
    return x.double() if isinstance(x, torch.Tensor) else x


# ---------------------------------------------------------------------------------------- schedule


def _schedule(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return how fast one program is at an early and at a late step, beside the dense one."""
    import diffusers

    torch.manual_seed(options.seed)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, num_layers=1,
        sample_size=options.latent, patch_size=1, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "linear" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    noise = torch.randn(1, 4, options.latent, options.latent)
    call = {"timestep": torch.tensor([STEPS[0]]), "class_labels": torch.tensor([1])}
    dense = attnopt.apply(attnopt.capture(model.eval(), (noise,), call), "exact")
    config = {"agents": 64, "timesteps": [SWITCH, 1000]}
    choices = tuple(Choice(s.name, "agent", config) for s in dense.sites)
    statistics = attnopt.calibrate(dense, [{"hidden_states": noise, **call}])
    plan = settled(dense, attnopt.Plan(choices, statistics=statistics))
    both = {
        "dense": attnopt.lower(dense, "eager"),
        "scheduled": attnopt.lower(attnopt.apply(dense, plan), "eager"),
    }
    rows: list[dict[str, Any]] = []
    for step in STEPS:
        call["timestep"] = torch.tensor([step])
        rows.append(_stepped(both, noise, call, step, options) | {"why": plan.choices[0].why})
        print(rows[-1], flush=True)
    return rows


def _stepped(
    models: dict[str, Any], noise: Any, call: dict[str, Any], step: int, options: argparse.Namespace
) -> dict[str, Any]:
    def called(name: str) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = models[name](noise, **call).sample
        return found

    wanted, found = called("dense"), called("scheduled")
    far = float((found - wanted).norm() / wanted.norm())
    assert (far < 1e-6) == (step < SWITCH), far
    calls = {name: lambda name=name: called(name) for name in models}
    timing = compare(calls, base="dense", most=options.rounds)
    return {
        "what": "DiT block by schedule",
        "tokens": options.latent**2,
        "timestep": step,
        "agents": step >= SWITCH,
        "difference": round(far, 6),
        "ms": {name: round(1e3 * timing.median(name), 2) for name in models},
        "speedup": as_row(timing.speedup("scheduled", "dense")),
    }


if __name__ == "__main__":
    sys.exit(main())
