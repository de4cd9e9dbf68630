"""Lowering: a program becomes a module of its own, with parameters, that a backend runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from attnopt import backends
from attnopt.backends import Backend
from attnopt.finder.ops import module_path
from attnopt.frontend.cleanup import at_device
from attnopt.graphs import copied_module
from attnopt.inlining import drop_idle, split_paddings
from attnopt.program import CallForm, Program
from attnopt.settling import settle

WEIGHTS = ("parameter", "buffer", "constant")


def lower(program: Program, backend: str = "inductor") -> nn.Module:
    """Return a module that runs a program: its own parameters, the source's call and output class.

    The parameters have the source's names and stay tied where they were. Where the source had
    `generate()`, the module has it.
    """
    target = backends.load(backend)
    if getattr(target, "grows", False):
        program = program.growing
    if set(program.parts) - {"encode", "decode"}:
        raise ValueError(
            f"{program.name} was captured module by module ({len(program.parts)} parts): only a "
            "graph of the whole model can be lowered; call the program itself"
        )
    model: nn.Module = lowered_class(program)(program, target)
    return model.train(False)


def lowered_class(program: Program) -> Any:
    """Return the class whose instances run a program as its source is used."""
    if not _is_transformer(program):
        return LoweredModule
    if not program.generates:
        from attnopt.generating import LoweredTransformer

        return LoweredTransformer
    if program.parts:
        from attnopt.seq2seq import LoweredSeq2Seq

        return LoweredSeq2Seq
    from attnopt.generating import LoweredLanguageModel

    return LoweredLanguageModel


def _is_transformer(program: Program) -> bool:
    """Tell whether a program was captured from a model of Transformers."""
    return program.config is not None and hasattr(program.config, "to_json_string")


class Runs:
    """What lowered modules have in common: weights in a module, graphs that read them."""

    def hold(self, program: Program, backend: Backend) -> None:
        """Take over the weights of a program; its graphs are made ready at the first call."""
        assert isinstance(self, nn.Module)
        self.program = program
        self.backend = backend
        self._ready: dict[str, Ready] = {}
        self._ready_for: Any = None
        hold_weights(self, program)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the program as its source is called."""
        ready = self._made_ready()
        if "" in ready:
            return ready[""](*args, **kwargs)
        route = self.program.form.route
        assert route is not None
        parts: Any = _Parts(ready)
        return route(parts, args, kwargs)

    def flat(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the flat outputs of a program that is one graph, for flattened inputs."""
        return self._made_ready()[""].flat(dict(values))

    def current_program(self) -> Program:
        """Return the program with the weights, and in the dtype, that the module has now."""
        assert isinstance(self, nn.Module)
        own = {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)
        captured = _captured_dtype(next(iter(self.program.parts.values()), self.program))
        program = self.program
        if dtype is not None and captured is not None and dtype != captured:
            program = program.cast(dtype)
        parts = {name: replace(part, weights=own) for name, part in program.parts.items()}
        return replace(program, weights=own, parts=parts)

    def _made_ready(self) -> "dict[str, Ready]":
        assert isinstance(self, nn.Module)
        first = next((p for p in self.parameters() if p.is_floating_point()), None)
        cpu = (torch.float32, torch.device("cpu"))
        place = cpu if first is None else (first.dtype, first.device)
        if place != self._ready_for:
            programs = self.program.parts or {"": self.program}
            whole: Any = getattr(self.backend, "ready", None)
            self._ready = {
                n: Ready.of(p, self, self.backend, *place)
                if whole is None
                else whole(p, self, *place)
                for n, p in programs.items()
            }
            self._ready_for = place
        return self._ready


@dataclass(frozen=True)
class _Parts:
    """Stands for a program whose parts are ready to run."""

    parts: "Mapping[str, Ready]"


class LoweredModule(Runs, nn.Module):
    """A program as a module."""

    def __init__(self, program: Program, backend: Backend):
        super().__init__()
        self.hold(program, backend)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program as its source is called."""
        return self.run(args, kwargs)


@dataclass(frozen=True)
class Ready:
    """A graph made ready to run on weights that live in a module."""

    form: CallForm
    call: Callable[..., Any]
    reads: tuple[Callable[[Mapping[str, Any]], Any], ...]
    paddings: Callable[[Mapping[str, Any]], dict[str, Any]]

    @staticmethod
    def of(
        program: Program, module: nn.Module | None, backend: Backend, dtype: torch.dtype,
        device: torch.device,
    ) -> "Ready":  # fmt: skip
        """Prepare a program for weights of a dtype on a device.

        Without a module the weights are values of the call, by the names of their placeholders.
        """
        program = retargeted(program, dtype, device)
        graph_module = program.graph_module
        making, names = split_paddings(graph_module)
        settle(graph_module, _constants(program, module, device))
        _drop_unread(graph_module)
        placeholders = [n.name for n in graph_module.graph.find_nodes(op="placeholder")]
        reads = tuple(_reader(name, program, module) for name in placeholders)
        call = backend.prepare(graph_module)
        return Ready(program.form, call, reads, _padding_maker(making, names))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call as the source is called."""
        values = self.form.flatten(args, kwargs)
        return self.form.unflatten(self.flat(values), values)

    def flat(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Return the graph's flat outputs for flattened inputs."""
        values.update(self.paddings(values))
        return tuple(self.call(*[read(values) for read in self.reads]))


def retargeted(program: Program, dtype: torch.dtype, device: torch.device) -> Program:
    """Return a program with a graph of its own that runs in another dtype on another device."""
    own = _captured_dtype(program) or dtype
    if own == dtype:
        graph_module = copied_module(program.graph_module)
        drop_idle(graph_module)
        graph_module = _keeping_values(graph_module, device)
        return replace(program, graph_module=graph_module, grown=None)
    graph_module = _keeping_values(copied_module(program.graph_module), device)
    for node in graph_module.graph.nodes:
        if not _follows_weights(node, own):
            _read_before_cast(node)
    for node in graph_module.graph.nodes:
        if _follows_weights(node, own):
            node.args = map_aggregate(node.args, lambda a: dtype if a is own else a)
            node.kwargs = map_aggregate(node.kwargs, lambda a: dtype if a is own else a)
        _refill(node, own, dtype)
    graph_module.recompile()
    states = tuple(replace(s, dtype=dtype if s.dtype == own else s.dtype) for s in program.states)
    changed = replace(program, graph_module=graph_module, grown=None)
    return changed.with_states(states) if states else changed


def _constants(
    program: Program, module: nn.Module | None, device: torch.device
) -> dict[str, Tensor]:
    """Return the values of the placeholders that are no weights, and no input of a call."""
    bindings = {n: b for n, b in program.bindings.items() if b.kind == "constant"}
    if module is not None:
        return {name: _reader(name, program, module)({}) for name in bindings}
    return {name: program.weights[b.name].to(device) for name, b in bindings.items()}


def _captured_dtype(program: Program) -> torch.dtype | None:
    """Return the dtype that the parameters had at capture."""
    for node in program.graph.find_nodes(op="placeholder"):
        binding = program.bindings[node.name]
        if binding.kind == "parameter" and node.meta["val"].is_floating_point():
            return node.meta["val"].dtype  # type: ignore[no-any-return]
    return None


def _keeping_values(graph_module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    moved = at_device(graph_module, device)
    for old, new in zip(graph_module.graph.nodes, moved.graph.nodes, strict=True):
        new.meta = old.meta
        if old.op == "placeholder":
            new.name, new.target = old.name, old.target
    return moved


def _follows_weights(node: fx.Node, own: torch.dtype) -> bool:
    """Tell a cast to the weights' dtype from one that the source wrote out, such as a norm's.

    At capture both name the same dtype; the source line tells which one was meant.
    """
    if node.op != "call_function" or own not in (*node.args, *node.kwargs.values()):
        return False
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    written = lines[-1] if lines else ""
    return not any(word in written for word in ("float32", ".float()", "torch.float)"))


def _read_before_cast(cast: fx.Node) -> None:
    """Let other modules read what a module cast for itself: a cast without effect was invisible."""
    if cast.target is not torch.ops.aten.to.dtype:
        return
    source: Any = cast.args[0]
    if source.meta["val"].dtype != cast.meta["val"].dtype:
        return
    own = module_path(cast)
    for user in list(cast.users):
        if not f"{module_path(user)}.".startswith(f"{own}."):
            user.replace_input_with(cast, source)


def _refill(node: fx.Node, own: torch.dtype, dtype: torch.dtype) -> None:
    """Replace the least and the largest number of a dtype by those of another, in place."""
    if not (own.is_floating_point and dtype.is_floating_point):
        return
    old, new = torch.finfo(own), torch.finfo(dtype)
    changes = {old.min: new.min, old.max: new.max}

    def change(x: Any) -> Any:
        return changes.get(x, x) if isinstance(x, float) else x

    node.args = map_aggregate(node.args, change)
    node.kwargs = map_aggregate(node.kwargs, change)


def _drop_unread(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if not node.users:
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _reader(
    name: str, program: Program, module: nn.Module | None
) -> Callable[[Mapping[str, Any]], Any]:
    """Return how a placeholder gets its value: from the call, or from the module as it is then."""
    binding = program.bindings.get(name)
    if module is None or binding is None or binding.kind not in WEIGHTS:
        return lambda values: values[name]
    path, _, last = binding.name.rpartition(".")
    owner = module.get_submodule(path)
    kept = vars(owner)["_parameters" if last in vars(owner)["_parameters"] else "_buffers"]
    return lambda values: kept[last]


def _padding_maker(
    making: fx.GraphModule | None, names: tuple[str, ...]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return what makes the padding masks of a call: None for one that hides nothing."""
    if making is None:
        return lambda values: {}
    inputs = [n.name for n in making.graph.find_nodes(op="placeholder")]
    forward = making.forward

    def make(values: Mapping[str, Any]) -> dict[str, Any]:
        masks = forward(*[values[name] for name in inputs])
        return {name: _unless_idle(mask) for name, mask in zip(names, masks, strict=True)}

    return make


def _unless_idle(mask: Tensor) -> Tensor | None:
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def hold_weights(module: nn.Module, program: Program) -> None:
    """Register a copy of every weight of a program under its name; what was tied stays tied."""
    first = {name: group[0] for group in program.source.tied for name in group}
    made: dict[str, nn.Parameter] = {}
    for name, kind in kinds_of(program).items():
        tensor = weight_named(program, name)
        owner, last = _owner(module, name)
        if kind != "parameter":
            persistent = kind == "buffer" and name not in program.source.transient
            owner.register_buffer(last, tensor.detach().clone(), persistent=persistent)
            continue
        twin = made.get(first.get(name, name))
        if twin is None or not torch.equal(twin, tensor):
            twin = _parameter(tensor)
            made.setdefault(first.get(name, name), twin)
        owner.register_parameter(last, twin)


def kinds_of(program: Program) -> dict[str, str]:
    """Return what each weight is, those that no graph reads included."""
    parts = (program, *program.parts.values())
    read = {b.name: b.kind for part in parts for b in part.bindings.values()}
    kinds: dict[str, str] = {}
    for part in parts:
        for name in part.weights:
            kinds[name] = read[name] if name in read else _unread_kind(part.weights[name])
    return kinds


def _unread_kind(weight: Tensor) -> str:
    return "parameter" if isinstance(weight, nn.Parameter) else "buffer"


def weight_named(program: Program, name: str) -> Tensor:
    """Return a weight of a program or of its parts."""
    parts = (program, *program.parts.values())
    return next(part.weights[name] for part in parts if name in part.weights)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=learns(tensor))


def learns(tensor: Tensor) -> bool:
    """Tell whether a parameter made of a tensor takes a gradient; kernels are chosen by it, too."""
    if isinstance(tensor, nn.Parameter):
        return tensor.requires_grad
    return tensor.is_floating_point() or tensor.is_complex()


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a dotted name, made where it is missing, and the last name."""
    *path, last = name.split(".")
    for part in path:
        children = vars(module)["_modules"]
        if part not in children:
            children[part] = nn.Module()
        module = children[part]
    return module, last
