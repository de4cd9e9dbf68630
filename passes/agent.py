"""Let the tokens of an image meet through agents, mean queries that collect and spread values.

Time and memory grow with the tokens times the agents. Without training, the sharpness of what is
spread and a shortcut of the values stand in for what is lost, fitted per layer on calibration data
(`attnopt.fitting`); a Nystrom core is tried beside the plain one. The trained form adds biases that
start at zero and a depth-wise convolution of the values that starts as the shortcut. A diffusion
model may use agents at some of its time steps only, which its input says at every call.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from attnopt.finder.ops import value
from attnopt.fitting import Fit, Trial, fit_agents
from attnopt.nouns import Choice, Mlp, No, Site
from attnopt.ops import agent_attention
from attnopt.ops.agent import STEPS
from attnopt.program import Program
from attnopt.surgery import GraphEdit

exact = False
tier = 2
weightless = True

Mode = Literal["free", "trained"]
Core = Literal["plain", "nystrom"]

_EXPONENTS = (1.0, 0.75, 0.5, 0.3, 0.1, -0.2, -0.5, -1.0)
_SHARES = (2, 4, 8)
_COARSE = 7  # cells of a table of biases, each way
_FILTER = 3
_BATCHES = 4  # that agents are fitted on before it is known where they serve


@dataclass(frozen=True)
class Config:
    """How many agents there are: a square number, or rows and columns; None leaves the site.

    What is None besides is fitted on calibration data: the core, the exponent of the second softmax
    and the shortcut, one number or one for each head. `ridge` and `steps` are those of the Nystrom
    core. With `timesteps` (low, high) agents are used where the `input` of the call that says the
    time step is at least low and below high.
    """

    agents: int | Sequence[int] | None = None
    mode: Mode = "free"
    core: Core | None = None
    exponent: float | None = None
    shortcut: float | Sequence[float] | None = None
    ridge: float = 1e-4
    steps: int = STEPS
    timesteps: Sequence[float] | None = None
    input: str = "timestep"


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the tokens of a site can meet through agents."""
    for refusal in (*_unplaced(site), *_hiding(site), *_impossible(site, config)):
        if refusal is not None:
            return refusal
    return True


def candidates(site: Site) -> tuple[Config, ...]:
    """List numbers of agents worth trying, the most first."""
    if site.grid is None:
        return (Config(),)
    sides = (site.grid.height, site.grid.width)
    found = [tuple(max(1, n // share) for n in sides) for share in _SHARES]
    return tuple(Config(agents) for agents in dict.fromkeys(found))


def proposals(site: Site | Mlp, asked: Any) -> tuple[Config, ...]:
    """List numbers of agents, each with the core, the exponent and the shortcut that fit best."""
    if isinstance(site, Mlp) or not {"flops", "latency"} & set(asked.goals):
        return ()
    found = candidates(site)
    return found if asked.statistics is None else tuple(_fitted(site, c, asked) for c in found)


def _fitted(site: Site, config: Config, asked: Any) -> Config:
    """Return a config with nothing left to calibration data; all sites are fitted at once."""
    if fits(site, config) is not True or not is_open(config):
        return config
    key = f"agent/{config.agents}"
    if key not in asked.statistics.memo:
        main = asked.program.main
        able = {s.name: _trial(s, config) for s in main.sites if fits(s, config) is True}
        rows = replace(asked.statistics, batches=asked.statistics.batches[:_BATCHES])
        asked.statistics.memo[key] = fit_agents(main, rows, able)
    found = asked.statistics.memo[key].get(site.name)
    return config if found is None else _said(config, found)


def alike(config: Config) -> str:
    """Return what is the same where another site is treated alike: the agents, not their fit."""
    return f"{config.agents} {config.mode} {config.timesteps}"


def settle(program: Program, stats: Any, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices with everything said that they leave to the calibration data."""
    sites = {s.name: s for s in program.sites}
    unsaid = {c.site: Config(**c.config) for c in choices if is_open(Config(**c.config))}
    unsaid = {name: c for name, c in unsaid.items() if fits(sites[name], c) is True}
    if not unsaid:
        return tuple(choices)
    found = fit_agents(program, stats, {n: _trial(sites[n], c) for n, c in unsaid.items()})
    return tuple(_settled(c, unsaid[c.site], found[c.site]) if c.site in found else c
                 for c in choices)  # fmt: skip


def is_open(config: Config) -> bool:
    """Tell whether a config leaves something to calibration data."""
    said = (_core(config), config.exponent, config.shortcut)
    return config.agents is not None and any(x is None for x in said)


def convert(site: Site, stats: Any, config: Config) -> dict[str, Tensor]:
    """Return no other weights: what the trained form adds is made with the graph."""
    return {}


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Put the op at a site, with its new parameters, and say when it is active."""
    if config.agents is None:
        return None
    if is_open(config):
        return No("its core, exponent and shortcut are to be fitted on calibration data", site.name)
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    node = edit.mapping[match.anchor]
    given = {name: x for name, x in node.kwargs.items() if x is not None and x is not False}
    beyond = [name for name in given if name != "scale"]
    if beyond:
        return No(f"its {beyond[0]} says something of pairs of tokens, which never meet", site.name)
    refusal = _other_tokens(node, site)
    if refusal is not None:
        return refusal
    active = _active(edit, node, site, config)
    if isinstance(active, No):
        return active
    options = {**_options(site, config), **given}
    if config.mode == "trained":
        options |= _parameters(edit, site, config)
    if active is not None:
        options["active"] = active
    node.target, node.kwargs = agent_attention, options
    return None


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the operations of attention for one image; no cache is kept."""
    assert site.grid is not None
    cells, width = site.grid.height * site.grid.width, site.head_dim + site.v_head_dim
    tokens = site.grid.leading + cells
    pairs: float = tokens**2
    if config.agents is not None:
        agents = math.prod(_sides(site, config))
        pairs = (site.grid.leading + agents) * tokens + cells * agents
    return {"flops": 2.0 * site.heads * width * pairs, "kv_elements_per_token": 0.0}


def tier_of(site: Site, config: Config) -> int:
    """Return the tier of a result: that of the source where nothing changes."""
    return 0 if config.agents is None else tier


# ---------------------------------------------------------------------------------------- settings


def _core(config: Config) -> Core | None:
    """Return the core; biases that are trained belong to the plain one."""
    return "plain" if config.mode == "trained" else config.core


def _sides(site: Site, config: Config) -> tuple[int, ...]:
    """Return how many agents there are, down and across; a square number has equal sides."""
    assert site.grid is not None
    assert config.agents is not None
    if not isinstance(config.agents, int):
        return tuple(config.agents)
    if config.agents == site.grid.height * site.grid.width:
        return (site.grid.height, site.grid.width)
    return (math.isqrt(config.agents),) * 2


def _shortcuts(site: Site, config: Config) -> list[float]:
    """Return the shortcut of each head."""
    given = config.shortcut
    assert given is not None
    return (
        [float(given)] * site.heads if isinstance(given, int | float) else list(map(float, given))
    )


def _options(site: Site, config: Config) -> dict[str, Any]:
    """Return the options of the op besides its tensors and its scale."""
    assert site.grid is not None
    found: dict[str, Any] = {
        "grid": [site.grid.height, site.grid.width],
        "agents": list(_sides(site, config)),
        "leading": site.grid.leading,
    }
    if config.exponent is not None:
        found["exponent"] = float(config.exponent)
    if _core(config) == "nystrom":
        found |= {"nystrom": True, "ridge": float(config.ridge), "steps": config.steps}
    if config.mode == "free" and config.shortcut is not None and any(_shortcuts(site, config)):
        found["shortcut"] = _shortcuts(site, config)
    return found


def _trial(site: Site, config: Config) -> Trial:
    """List what is to be tried: every core and exponent that is not given."""
    core = _core(config)
    cores = get_args(Core) if core is None else (core,)
    exponents = _EXPONENTS if config.exponent is None else (config.exponent,)
    said = replace(config, mode="free")
    tried = [
        _options(site, replace(said, core=core, exponent=exponent))
        for core in cores
        for exponent in exponents
    ]
    rows = None if config.timesteps is None else (config.input, *map(float, config.timesteps))
    return Trial(tried, rows)  # type: ignore[arg-type]  # two numbers, as `fits` has seen


def _settled(choice: Choice, config: Config, fit: Fit) -> Choice:
    """Return a choice that says what was found."""
    made = _said(config, fit)
    why = f"{made.core} core, exponent {made.exponent:g}: {fit.error:.1%} of the output is lost"
    return replace(choice, config=asdict(made), why=choice.why or why)


def _said(config: Config, fit: Fit) -> Config:
    """Return a config that says what was found."""
    core: Core = "nystrom" if fit.options.get("nystrom") else "plain"
    made = replace(config, core=core, exponent=fit.options["exponent"])
    return made if config.shortcut is not None else replace(made, shortcut=list(fit.shortcut))


# ------------------------------------------------------------------------------------------- graph


def _named(site: Site, name: str) -> str:
    """Return the name of a new parameter of a site."""
    return f"{site.name.replace('#', '_')}.agent_{name}"


def _shapes(site: Site, config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the new parameters of the trained form by name."""
    assert site.grid is not None
    height, width = site.grid.height, site.grid.width
    heads = (site.heads, math.prod(_sides(site, config)))
    found: dict[str, tuple[int, ...]] = {}
    for stage in ("collect", "spread"):
        found[f"{stage}_table"] = (*heads, min(_COARSE, height), min(_COARSE, width))
        found[f"{stage}_rows"] = (*heads, height, 1)
        found[f"{stage}_columns"] = (*heads, 1, width)
    if site.grid.leading:
        found["collect_first"] = (*heads, site.grid.leading)
    found["filter"] = (site.heads * site.v_head_dim, 1, _FILTER, _FILTER)
    return {_named(site, name): shape for name, shape in found.items()}


def _initial(edit: GraphEdit, site: Site, config: Config) -> dict[str, Tensor]:
    """Return the new parameters as they begin: biases of zero, a convolution that copies."""
    like = edit.program.weights[site.projections["o"].parameter]
    made = {name: like.new_zeros(shape) for name, shape in _shapes(site, config).items()}
    middle = made[_named(site, "filter")][:, 0, _FILTER // 2, _FILTER // 2]
    middle.copy_(torch.tensor(_shortcuts(site, config)).repeat_interleave(site.v_head_dim))
    return made


def _parameters(edit: GraphEdit, site: Site, config: Config) -> dict[str, Any]:
    """Insert inputs for the new parameters; return the options that read them."""
    made = {name: edit.parameter(name, x) for name, x in _initial(edit, site, config).items()}
    found: dict[str, Any] = {
        stage: [made[_named(site, f"{stage}_{part}")] for part in ("table", "rows", "columns")]
        for stage in ("collect", "spread")
    }
    for name in ("collect_first", "filter"):
        if _named(site, name) in made:
            found[name] = made[_named(site, name)]
    return found


def _active(edit: GraphEdit, node: fx.Node, site: Site, config: Config) -> fx.Node | No | None:
    """Insert what tells from the time step whether agents are used; None where they always are."""
    if config.timesteps is None:
        return None
    inputs = {b.name: place for place, b in edit.program.bindings.items() if b.kind == "input"}
    places = {n.name: n for n in edit.graph.find_nodes(op="placeholder")}
    step = places.get(inputs.get(config.input, ""))
    if step is None or not isinstance(value(step), Tensor):
        return No(
            f"the program has no tensor {config.input!r} that says the time step; its inputs are "
            f"{', '.join(sorted(inputs))}: name one of them, or capture it as a tensor",
            site.name,
        )
    if value(step).dim() > 1:
        return No(f"{config.input!r} is no time step: it has {value(step).dim()} axes", site.name)
    low, high = config.timesteps
    aten = torch.ops.aten
    late = edit.shared_call(aten.ge.Scalar, step, low)
    early = edit.shared_call(aten.lt.Scalar, step, high)
    return edit.shared_call(aten.logical_and.default, late, early)


def _other_tokens(node: fx.Node, site: Site) -> No | None:
    """Say why the tokens of an op are not those of its grid."""
    assert site.grid is not None
    wanted = site.grid.leading + site.grid.height * site.grid.width
    given: Sequence[Any] = node.args[:2]
    counts = [value(x).shape[2] for x in given]
    if any(not isinstance(n, int) for n in counts):
        return No("its number of tokens varies from call to call; a grid has one size", site.name)
    if counts != [wanted, wanted]:
        why = f"it has {counts[0]} queries and {counts[1]} keys where its grid has {wanted}"
        return No(why, site.name)
    return None


# ---------------------------------------------------------------------------------------- refusals


def _unplaced(site: Site) -> Iterator[No | None]:
    if site.mask.kind == "causal" or site.cached:
        yield No("agents mix all tokens, so that none can be hidden from another: not where it is "
                 "causal or has a cache", site.name)  # fmt: skip
    if site.kind == "cross":
        yield No("its keys are other tokens than its queries", site.name)
    if site.grid is None:
        yield No("its tokens are not those of an image, row by row, as far as the graph says",
                 site.name)  # fmt: skip
    if site.kv_heads != site.heads:
        yield No(f"{site.heads} query heads share {site.kv_heads} key heads, for which agents are "
                 "not defined", site.name)  # fmt: skip


def _hiding(site: Site) -> Iterator[No | None]:
    if site.mask.kind != "none":
        yield No(f"its mask is {site.mask}, and agents hide no token from another", site.name)
    if site.padded:
        yield No("padding hides some of its tokens, and agents hide none", site.name)
    for name, there in (("bias", site.bias != "none"), ("softcap", site.softcap is not None),
                        ("sinks", site.sinks)):  # fmt: skip
        if there:
            yield No(f"its {name} changes scores of pairs of tokens, which never meet", site.name)


def _impossible(site: Site, config: Config) -> Iterator[No | None]:
    """Say which setting cannot be."""
    for name, allowed in (("mode", get_args(Mode)), ("core", (*get_args(Core), None))):
        if getattr(config, name) not in allowed:
            told = " or ".join(str(x) for x in allowed if x)
            yield No(f"{name} {getattr(config, name)!r}: it is {told}", site.name)
    if config.mode == "trained" and config.core == "nystrom":
        yield No("the nystrom core has no trained form; leave the core out", site.name)
    if config.agents is not None and site.grid is not None:
        yield _agents(site, config)
    if isinstance(config.shortcut, Sequence) and len(config.shortcut) != site.heads:
        yield No(f"{len(config.shortcut)} shortcuts: one, or one for each of {site.heads} heads",
                 site.name)  # fmt: skip
    if config.ridge < 0 or config.steps < 1:
        yield No(f"ridge {config.ridge}, steps {config.steps}: from 0 and from 1", site.name)
    if config.timesteps is not None and not _is_range(config.timesteps):
        yield No(f"timesteps {config.timesteps!r}: the lowest, and the one after the highest",
                 site.name)  # fmt: skip


def _agents(site: Site, config: Config) -> No | None:
    """Say why a grid cannot have so many agents."""
    assert site.grid is not None
    sides = (site.grid.height, site.grid.width)
    shown = " x ".join(map(str, sides))
    if isinstance(config.agents, int) and math.prod(_sides(site, config)) != config.agents:
        near = max(1, math.isqrt(max(config.agents, 0)))
        why = f"{config.agents} agents are no square; choose {near**2} or {(near + 1) ** 2}"
        return No(f"{why}, or say rows and columns", site.name)
    agents = _sides(site, config)
    if len(agents) != 2 or any(not 1 <= a <= n for a, n in zip(agents, sides, strict=False)):
        said = " x ".join(map(str, agents))
        return No(f"agents {said} of a grid of {shown}: from 1 to all, each way", site.name)
    return None


def _is_range(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and len(given) == 2
        and all(isinstance(x, int | float) for x in given)
        and given[0] < given[1]
    )
