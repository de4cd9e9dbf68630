"""torch.compile(model, backend="attnopt"): rewrite what dynamo captured, and compile the result.

Dynamo's graph is traced again to the level that the finder reads. Parameters arrive as inputs, so
only ops and masks are replaced; weights change before compiling or not at all.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.frontend.cleanup import schema_of
from attnopt.frontend.retracing import constants_as_attributes, normalize
from attnopt.inlining import inline_attention
from attnopt.nouns import No, Site
from attnopt.program import Binding, BindingKind, CallForm, Program
from attnopt.rewriting import rewrite_exactly

_PROOF_ELEMENTS = 2**27


@dataclass(frozen=True)
class Options:
    """What torch.compile's `options` may say."""

    plan: str = "exact"
    inner: str = "inductor"
    on_miss: Literal["warn", "raise", "ignore"] = "warn"


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
    """What compilations of one process share: proofs by structure, and the report."""

    proved: dict[str, No | None]
    report: CompileReport


_PROCESS = _Process({}, CompileReport())


def compile_report(*, reset: bool = False) -> CompileReport:
    """Return what backend "attnopt" found, rewrote and refused since the last reset."""
    report = _PROCESS.report
    if reset:
        _PROCESS.report = CompileReport()
    return report


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Callable[..., Any]:
    """Rewrite the attentions of a graph that dynamo captured, and compile it with `inner`."""
    chosen = _options(options or {})
    inner = lookup_backend(chosen.inner)
    if not _may_attend(graph_module):
        return inner(graph_module, list(example_inputs), **others)
    _fix_floats(graph_module)
    program = traced(graph_module, example_inputs)
    changed, report = _rewritten(program)
    _PROCESS.report += report
    _speak(report, program, chosen.on_miss)
    if not report.rewritten:
        return inner(graph_module, list(example_inputs), **others)
    result = changed.graph_module
    inline_attention(result, remember=False)
    kinds = {name: b.kind for name, b in program.bindings.items()}
    constants_as_attributes(
        result, {n: t for n, t in program.weights.items() if kinds.get(n) == "constant"}
    )
    _take_over(graph_module, result)
    return inner(result, list(example_inputs), **others)


def _options(given: Mapping[str, Any]) -> Options:
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            raise ValueError(f"backend 'attnopt' has no option {name!r}; it has {', '.join(known)}")
    chosen = Options(**given)
    if chosen.plan != "exact":
        raise ValueError(
            f"plan={chosen.plan!r}: a compiled model keeps its weights, so the plan is 'exact'; "
            "apply another plan first and compile what attnopt.lower returns"
        )
    if chosen.on_miss not in ("warn", "raise", "ignore"):
        raise ValueError(f"on_miss={chosen.on_miss!r}: it is 'warn', 'raise' or 'ignore'")
    return chosen


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
    with mode, fx_traceback.preserve_node_meta():
        made = make_fx(fx.Interpreter(graph_module).run, pre_dispatch=True)(*fakes)
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


def _rewritten(program: Program) -> tuple[Program, CompileReport]:
    """Rewrite the graph, each new structure proved, and say what was done."""
    mutating = next((n for n in program.graph.nodes if _mutates(n)), None)
    if mutating is not None:
        no = No("the graph changes a tensor in place", mutating.name)
        sites = program.sites
        return program, CompileReport(found=sites, refused=(no,) * bool(sites))
    changed, done = rewrite_exactly(program, _PROCESS.proved, largest_proof=_PROOF_ELEMENTS)
    rewritten = tuple(s for s in program.sites if s.name in done)
    return changed, CompileReport(program.sites, rewritten, changed.refused)


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(schema_of(target).is_mutable)


def _speak(report: CompileReport, program: Program, on_miss: str) -> None:
    """Say what was found and not rewritten, as `on_miss` asks."""
    missed = [str(no) for no in report.refused]
    if not report.found:
        missed += [f"{m.module} ({m.node}): {m.why}" for m in program.near_misses]
    if not missed or on_miss == "ignore":
        return
    text = f"attnopt left {len(missed)} attentions as they were: {'; '.join(missed[:3])}"
    if on_miss == "raise":
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)


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
