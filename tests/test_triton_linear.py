"""The kernels of linear attention, against the definition."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from attnopt.backends.triton_gpu.linear import far_sums
from attnopt.backends.triton_gpu.mixing import attend_linear
from attnopt.ops import linear_attention_reference
from tests.conformance import draw
from tests.triton_problems import DEVICE, check, is_real

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def operands(tokens, width, own, dtype=torch.float64):
    sizes = ((1, 2, tokens, width), (1, 2, tokens, width), (1, 2, tokens, own))
    return [draw(*s, seed=i).to(DEVICE, dtype) for i, s in enumerate(sizes)]


def defined(a, b, c, decay, shift):
    place = torch.arange(a.shape[2], device=a.device)
    distance = place.unsqueeze(1) - place
    weights = a @ b.transpose(-1, -2)
    if decay is not None:
        weights = weights * decay.to(a.dtype).view(-1, 1, 1) ** distance.clamp(min=0)
    return weights.masked_fill(distance < shift, 0.0) @ c


@pytest.mark.parametrize(
    ("tokens", "width", "own", "shift", "decays"),
    [
        (1, 16, 16, 0, False),
        (63, 8, 20, 5, True),
        (130, 65, 17, 64, True),
        *(pytest.param(200, 65, 17, s, s > 5, marks=pytest.mark.slow) for s in (0, 5, 64, 100)),
    ],
)
def test_sums_and_their_gradients_are_those_of_the_definition(tokens, width, own, shift, decays):
    decay = torch.tensor([0.9, 0.99], device=DEVICE) if decays else None
    wide = [x.requires_grad_() for x in operands(tokens, width, own)]
    given = [x.detach().float().requires_grad_() for x in wide]
    want, found = defined(*wide, decay, shift), far_sums(*given, decay, shift)
    check(found, want)
    grad = draw(*want.shape, seed=9).to(DEVICE)
    wanted = torch.autograd.grad(want, wide, grad)
    for a, b in zip(torch.autograd.grad(found, given, grad.float()), wanted, strict=True):
        check(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_in_the_dtype_of_a_model(dtype):
    a, b, c = operands(130, 16, 16, dtype)
    found = far_sums(a, b.softmax(-1), c, None, 7)
    want = defined(a.double(), b.softmax(-1).double(), c.double(), None, 7)
    check(found.to(dtype), want, dtype)


def call(window, feature="centroids", padded=0):
    q = draw(2, 4, 90, 16, seed=1).to(DEVICE, torch.float32)
    k, v = (draw(2, 2, 90, 16, seed=s).to(DEVICE, torch.float32) for s in (2, 3))
    rows = 17 if feature == "centroids" else 16
    maps = [draw(4, rows, 8, seed=s).to(DEVICE, torch.float32) / 4 for s in (4, 5)]
    settings = {"window": window, "feature": feature, "causal": True}
    if padded:
        seen = torch.ones(2, 1, 1, 90, dtype=torch.bool, device=DEVICE)
        seen[1, ..., :padded] = False
        settings["padding"] = seen
    return [q, k, v, *maps], settings


@pytest.mark.parametrize(
    ("window", "feature", "padded"),
    [
        (5, "centroids", 0),
        pytest.param(70, "centroids", 40, marks=pytest.mark.slow),
        (0, "elu", 30),
        pytest.param(0, "centroids", 0, marks=pytest.mark.slow),
    ],
)
def test_attention_and_its_gradients_are_those_of_the_definition(window, feature, padded):
    tensors, settings = call(window, feature, padded)
    wide = [x.double().requires_grad_() for x in tensors]
    given = [x.requires_grad_() for x in tensors]
    want = linear_attention_reference(*wide, **settings)
    found = attend_linear(*given, **settings)
    check(found, want)
    grad = draw(*want.shape, seed=9).to(DEVICE)
    wanted = torch.autograd.grad(want, wide, grad)
    for a, b in zip(torch.autograd.grad(found, given, grad.float()), wanted, strict=True):
        check(a, b)


def test_what_the_kernels_do_not_take_goes_to_the_copy_of_every_machine():
    tensors, settings = call(6, "hedgehog")
    want = linear_attention_reference(*(x.double() for x in tensors), **settings)
    check(attend_linear(*tensors, **settings), want)
    assert all(is_real(x) for x in tensors)
