"""torch.compile(model, backend="attnopt"): rewrite what dynamo captured, and compile the result.

Dynamo's graph is traced again to the level that the finder reads. Parameters arrive as inputs, so
only ops and masks are replaced; weights change before compiling or not at all.
"""

import contextlib
import difflib
import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.finder.cuts import find_cuts
from attnopt.frontend.retracing import constants_as_attributes, normalize, read_sizes
from attnopt.frontend.vmaps import without_vmaps
from attnopt.frontend.writes import put_back_writes, take_out_writes
from attnopt.inlining import inline_attention
from attnopt.nouns import Choice, NearMiss, No, Plan, Site
from attnopt.program import Binding, BindingKind, CallForm, Program
from attnopt.rewriting import rewrite_exactly
from attnopt.settling import settle

_PROOF_ELEMENTS = 2**27


@dataclass(frozen=True)
class Options:
    """What torch.compile's `options` may say.

    plan: "exact" for every attention, a Plan, or the file of one: the sites that it names.
    inner: the backend that compiles the result, by its registered name.
    on_miss: what to do about an attention that stays as it was: "warn" or "error".
    explain: write what was found and done to stderr, a line an attention.
    """

    plan: str | os.PathLike[str] | Plan = "exact"
    inner: str = "inductor"
    on_miss: Literal["warn", "error"] = "warn"
    explain: bool = False


@dataclass(frozen=True)
class CompileReport:
    """The attentions of all graphs compiled since the last reset, in order."""

    found: tuple[Site, ...] = ()
    rewritten: tuple[Site, ...] = ()
    refused: tuple[No, ...] = ()

    def __add__(self, other: "CompileReport") -> "CompileReport":
        """Join two reports."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return CompileReport(*(a + b for a, b in pairs))


@dataclass
class _Process:
    """What compilations of one process share: proofs by structure, the report, and its names.

    Of each name it knows a weight of the attention that has it.
    """

    proved: dict[str, No | None]
    report: CompileReport
    names: dict[str, weakref.ref[Tensor]] = field(default_factory=dict)


_PROCESS = _Process({}, CompileReport())


def compile_report(*, reset: bool = False) -> CompileReport:
    """Return what backend "attnopt" found, rewrote and refused since the last reset."""
    report = _PROCESS.report
    if reset:
        _PROCESS.report = CompileReport()
        _PROCESS.names.clear()
    return report


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Callable[..., Any]:
    """Rewrite the attentions of a graph that dynamo captured, and compile it with `inner`."""
    chosen = read_options(options or {})
    inner = lookup_backend(chosen.inner)
    if not _may_attend(graph_module):
        return inner(graph_module, list(example_inputs), **others)
    _fix_floats(graph_module)
    read_sizes(graph_module)
    program = traced(graph_module, example_inputs)
    leaked = _without_data(program)
    written = take_out_writes(program.graph_module) if leaked is None else leaked
    changed, report = _rewritten(program, chosen, written)
    report = _told_apart(report, program)
    _PROCESS.report += report
    _speak(report, program, chosen)
    if not report.rewritten:
        return inner(graph_module, list(example_inputs), **others)
    result = changed.graph_module
    inline_attention(result, remember=False)
    kinds = {name: b.kind for name, b in program.bindings.items()}
    constants_as_attributes(
        result, {n: t for n, t in program.weights.items() if kinds.get(n) == "constant"}
    )
    settle(result)
    put_back_writes(result, () if isinstance(written, No) else written)
    _take_over(graph_module, result)
    return inner(result, list(example_inputs), **others)


def read_options(given: Mapping[str, Any]) -> Options:
    """Check torch.compile's options, and read the plan where it is a file."""
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise ValueError(f"backend 'attnopt' has no option {name!r}{hint}")
    chosen = Options(**given)
    if chosen.on_miss not in ("warn", "error"):
        raise ValueError(f"on_miss={chosen.on_miss!r}: it is 'warn' or 'error'")
    if not isinstance(chosen.explain, bool):
        raise ValueError(f"explain={chosen.explain!r}: it is True or False")
    if isinstance(chosen.plan, Plan) or chosen.plan == "exact":
        return chosen
    if not isinstance(chosen.plan, str | os.PathLike):
        raise ValueError(f"plan={chosen.plan!r}: it is 'exact', a Plan, or the file of one")
    if not Path(chosen.plan).is_file():
        raise ValueError(f"plan={chosen.plan!r} is neither 'exact' nor a file of a plan")
    return replace(chosen, plan=Plan.load(chosen.plan))


def _may_attend(graph_module: fx.GraphModule) -> bool:
    """Tell whether a graph has anything like a normalisation of scores."""
    words = ("softmax", "scaled_dot_product", "exp", "flex_attention", "logsumexp")
    return any(
        word in str(getattr(n.target, "__name__", n.target))
        for n in graph_module.graph.nodes
        if n.op in ("call_function", "call_method")
        for word in words
    )


def _fix_floats(graph_module: fx.GraphModule) -> None:
    """Make numbers of the source's attributes constants again, in place, with a guard on each.

    With `dynamic=True` dynamo hands over even a model's scale as an input.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_method", target="item"):
        found = node.meta.get("example_value")
        if isinstance(found, torch.SymFloat) and found.node.hint is not None:
            node.replace_all_uses_with(float(found))
            graph.erase_node(node)
    graph_module.recompile()


def traced(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Trace a graph of dynamo again, to ATen before dispatch, as a Program."""
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    fakes = [_fake(context, mode, x) for x in example_inputs]
    # Numbers that data decide get symbols of their own, which dynamo does not wait for.
    fresh: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if mode.shape_env is not None:
        fresh = mode.shape_env.ignore_fresh_unbacked_symbols()
    with mode, fresh, fx_traceback.preserve_node_meta():
        plain = without_vmaps(graph_module, fakes)
        made = make_fx(fx.Interpreter(plain).run, pre_dispatch=True)(*fakes)
    placeholders = made.graph.find_nodes(op="placeholder")
    sources = graph_module.graph.find_nodes(op="placeholder")
    bindings: dict[str, Binding] = {}
    weights: dict[str, Tensor] = {}
    for new, old, given in zip(placeholders, sources, example_inputs, strict=True):
        new.name, new.target = old.name, old.target
        kind, name = _binding(str(old.target), given)
        bindings[new.name] = Binding(kind, name)
        if kind in ("parameter", "buffer"):
            weights[name] = given
    constants = normalize(made)
    bindings |= {name: Binding("constant", name) for name in constants}
    weights |= constants
    return Program("compiled", made, bindings, weights, CallForm(_no_call, _no_call))


def _without_data(program: Program) -> No | None:
    """Say where tracing left a value of its own in the graph, as it does in loops that are ops."""
    for binding in program.bindings.values():
        if binding.kind == "constant" and isinstance(
            program.weights[binding.name], torch._subclasses.FakeTensor
        ):
            return No("tracing the graph again leaves a constant without data", binding.name)
    return None


def _no_call(*args: Any) -> Any:
    raise TypeError("a graph of torch.compile is called by dynamo only")


def _fake(context: TracingContext, mode: Any, given: Any) -> Any:
    if not isinstance(given, Tensor) or isinstance(given, torch._subclasses.FakeTensor):
        return given
    symbolic = context.tensor_to_context.get(given)
    source = getattr(symbolic, "tensor_source", None)
    return mode.from_tensor(
        given, static_shapes=symbolic is None, symbolic_context=symbolic, source=source
    )


def _binding(target: str, given: Any) -> tuple[BindingKind, str]:
    """Read what an input of dynamo's graph is from the name that dynamo gave it."""
    name = re.sub(r"^[Ll]_|_$", "", target)
    if isinstance(given, nn.Parameter):
        return "parameter", name
    if not isinstance(given, Tensor):
        return "input", name
    if "_buffers_" in name:
        return "buffer", name
    if given.dim() == 4 and ("past_key_value" in name or "cache" in name):
        return "state", name
    last = re.sub(r"^(kwargs|args)_|_$", "", name)
    return "input", last


def _rewritten(
    program: Program, chosen: Options, written: tuple[str, ...] | No
) -> tuple[Program, CompileReport]:
    """Rewrite the sites that the plan names, each new structure proved, and say what was done."""
    sites = program.sites
    cuts = tuple(No(m.why, _place(m)) for m in find_cuts(program))
    if isinstance(written, No):
        return program, CompileReport(found=sites, refused=((written,) * bool(sites)) + cuts)
    choices = chosen.plan.choices if isinstance(chosen.plan, Plan) else None
    wanted = None if choices is None else {c.site for c in choices if c.rewrite == "exact"}
    changed, done = rewrite_exactly(
        program, _PROCESS.proved, largest_proof=_PROOF_ELEMENTS, only=wanted
    )
    rewritten = tuple(s for s in sites if s.name in done)
    others = (_needs_weights(c) for c in choices or () if c.rewrite != "exact")
    here = {s.name for s in sites}
    refused = (*changed.refused, *(no for no in others if no.where in here), *cuts)
    return changed, CompileReport(sites, rewritten, refused)


def _place(miss: NearMiss) -> str:
    return f"{miss.module or 'model'} ({miss.node})"


def _told_apart(report: CompileReport, program: Program) -> CompileReport:
    """Number the sites that have the name of another attention.

    Where dynamo cuts a model, it names what follows from the module that it was in: layers of one
    kind have one name.
    """
    names = {site.name: _free_name(site, program) for site in report.found}
    found, rewritten = (
        tuple(replace(site, name=names[site.name]) for site in sites)
        for sites in (report.found, report.rewritten)
    )
    return replace(report, found=found, rewritten=rewritten)


def _free_name(site: Site, program: Program) -> str:
    """Return the first numbered name that nobody has, or that the site has by its weights."""
    known = [p.parameter for p in site.projections.values() if p.parameter in program.weights]
    if not known:
        return site.name
    weight = program.weights[known[0]]
    number, name = 1, site.name
    while name in _PROCESS.names and _PROCESS.names[name]() is not weight:
        number += 1
        name = f"{site.name}#{number}"
    _PROCESS.names[name] = weakref.ref(weight)
    return name


def _needs_weights(choice: Choice) -> No:
    return No(
        f"pass {choice.rewrite!r} changes weights, which a compiled model keeps; apply the plan "
        "with attnopt.apply and compile what attnopt.lower returns",
        choice.site,
    )


def _speak(report: CompileReport, program: Program, chosen: Options) -> None:
    """Say what was found and done, and what was not rewritten, as the options ask."""
    told = {no.where for no in report.refused}
    misses = [f"{_place(m)}: {m.why}" for m in program.near_misses if _place(m) not in told]
    if chosen.explain:
        for line in _explained(report, misses):
            print(f"attnopt: {line}", file=sys.stderr)
    missed = [str(no) for no in report.refused]
    if not report.found:
        missed += misses
    if not missed and report.found and not report.rewritten:
        names = ", ".join(s.name for s in report.found[:3])
        missed = [f"the plan names none of the {len(report.found)} that are here ({names} ...)"]
    if not missed:
        return
    text = f"attnopt left {len(missed)} attentions as they were: {'; '.join(missed[:3])}"
    if chosen.on_miss == "error":
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)


def _explained(report: CompileReport, misses: Sequence[str]) -> Iterator[str]:
    """Yield a line for each attention of a graph, and for what looks like one."""
    for site in report.found:
        done = "rewritten" if site in report.rewritten else "as it was"
        heads = f"{site.heads} heads of {site.head_dim} over {site.kv_heads}"
        yield f"{site.name}: {site.kind}, {site.mask}, {heads}: {done}"
    yield from (f"refused: {no}" for no in report.refused)
    yield from (f"no attention: {miss}" for miss in misses)


def _take_over(source: fx.GraphModule, result: fx.GraphModule) -> None:
    """Keep what dynamo says about a graph and its inputs."""
    result.meta.update(source.meta)
    pairs = zip(
        source.graph.find_nodes(op="placeholder"),
        result.graph.find_nodes(op="placeholder"),
        strict=True,
    )
    for old, new in pairs:
        new.meta.update({k: x for k, x in old.meta.items() if k not in ("val", "example_value")})
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
