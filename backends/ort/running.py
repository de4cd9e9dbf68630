"""Run programs in ONNX Runtime from Python: written once to a temporary folder, tensors bound."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.backends.ort.exporting import FILE, check_installed, write_files
from attnopt.backends.ort.operators import Target
from attnopt.backends.ort.providers import NAMES, runs_here
from attnopt.backends.ort.signature import Signature, signature_of
from attnopt.nouns import No
from attnopt.program import CallForm, Program


class Session:
    """A program as a session of ONNX Runtime; its weights are those at the time it was made."""

    def __init__(self, program: Program, module: nn.Module, device: torch.device) -> None:
        check_installed()
        signature = signature_of(program)
        if isinstance(signature, No):
            raise NotImplementedError(f"{program.name} cannot run in ONNX Runtime yet: {signature}")
        self.form: CallForm = program.form
        self.signature: Signature = signature
        self.device = device
        self.session = _opened(program, module, signature, device)
        self.handed_on = _handed_on(program, signature)
        self.taken = {i.name for i in self.session.get_inputs()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call as the source is called."""
        values = self.form.flatten(args, kwargs)
        return self.form.unflatten(self.flat(values), values)

    def flat(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the graph's flat outputs for flattened inputs; nothing is copied on the way in."""
        binding = self.session.io_binding()
        names = [*self.signature.inputs, *(s.placeholder for s in self.signature.states)]
        held: list[Tensor] = []
        for name, told in zip(names, self.signature.input_names, strict=True):
            if told in self.taken:
                held.append(values[name].detach().contiguous())
                self._bind(binding, told, held[-1])
        for output in self.session.get_outputs():
            binding.bind_output(output.name, self.device.type, self.device.index or 0)
        self.session.run_with_iobinding(binding)
        given = [_tensor(x, self.device) for x in binding.get_outputs()]
        found = {number: values[name] for number, name in self.handed_on.items()}
        found |= dict(zip(self.signature.kept, given, strict=True))
        return tuple(found[number] for number in range(len(found)))

    def _bind(self, binding: Any, name: str, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            # An empty tensor has no address to bind.
            from onnxruntime import OrtValue

            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(tensor.cpu().numpy()))
            return
        binding.bind_input(
            name=name,
            device_type=tensor.device.type,
            device_id=tensor.device.index or 0,
            element_type=_NUMPY[tensor.dtype],
            shape=tuple(tensor.shape),
            buffer_ptr=tensor.data_ptr(),
        )


def _handed_on(program: Program, signature: Signature) -> dict[int, str]:
    """Return the outputs of a graph that are inputs of it, by number."""
    flat: Any = program.graph.output_node().args[0]
    return {n: x.name for n, x in enumerate(flat) if n not in signature.kept}


_NUMPY: dict[torch.dtype, Any] = {
    dtype: torch.zeros(0, dtype=dtype).numpy().dtype
    for dtype in (torch.float32, torch.int64, torch.int32, torch.bool, torch.float64)
}


def ready(program: Program, module: nn.Module, dtype: torch.dtype, device: torch.device) -> Session:
    """Return a session that runs a program on the weights that a module has now."""
    if dtype != torch.float32:
        raise ValueError(f"backend 'ort' runs in float32, not {dtype}; use model.float()")
    return Session(program, module, device)


def _opened(program: Program, module: nn.Module, signature: Signature, device: torch.device) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    target = Target("cpu" if device.type == "cpu" else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_files({FILE: (program, signature)}, module, Path(folder), target)
        path = Path(folder) / FILE
        return onnxruntime.InferenceSession(path, options, providers=_providers(device))


def _providers(device: torch.device) -> list[str]:
    import onnxruntime

    if device.type not in NAMES or not runs_here(device.type):
        raise ValueError(
            f"ONNX Runtime has no provider that runs on {device} here; installed are "
            f"{', '.join(onnxruntime.get_available_providers())}"
        )
    return list(dict.fromkeys([NAMES[device.type], NAMES["cpu"]]))


def _tensor(value: Any, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.from_numpy(value.numpy())
    from torch.utils.dlpack import from_dlpack

    found: Tensor = from_dlpack(value._ortvalue.to_dlpack())
    return found
