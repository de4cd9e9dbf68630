"""What a program can be captured from, and what each damaged or hostile source is refused with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import decoder
from test_capture_zoo import build, error_of

import attnopt

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00006.safetensors"


class Attention(torch.nn.Module):
    """Attention on queries, keys and values that come from outside."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        return torch.softmax(scores, -1) @ v.transpose(1, 2)


def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict]:
    return Attention(), tuple(torch.randn(2, n, 3, 4) for n in (5, 7, 7)), {}


def nothing() -> int:
    return 3


def test_raw_queries_keys_and_values_may_have_any_length() -> None:
    model, args, _ = make()
    program = attnopt.capture(model, args)
    q, k, v = (torch.randn(3, n, 3, 4) for n in (11, 6, 6))
    assert error_of(program(q, k, v), model(q, k, v)) < 1e-5
    with pytest.raises(ValueError, match="q has size 5 at axis 2; the captured graph takes 3 only"):
        program(q.new_zeros(2, 5, 5, 4), k, v)


def short() -> Any:
    """Return a module and its arguments, without keywords."""
    return make()[:2]


def odd() -> Any:
    """Return a module and what are no arguments."""
    return make()[0], 3


@pytest.mark.parametrize("name", ["make", "short"])
def test_a_factory_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    program = attnopt.capture(f"test_capture_inputs:{name}")
    _, args, _ = make()
    assert program(*args).shape == (2, 3, 5, 4)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("test_capture_inputs:nothing", "must return a module or .*, not int"),
        ("test_capture_inputs:odd", r"not a tuple of \w+, int"),
        ("test_capture_inputs:absent", "has no attribute 'absent'"),
        ("no_such_package:make", "No module named 'no_such_package'"),
    ],
)
def test_what_is_no_factory_is_refused(
    monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(ValueError, match=message):
        attnopt.capture(place)


def test_a_saved_program_is_read_where_it_is_trusted(tmp_path: Path) -> None:
    place = str(tmp_path / "program.pt2")
    model, args, _ = make()
    torch.export.save(torch.export.export(model, args), place)
    with pytest.raises(ValueError, match="pass trust_pickle=True"):
        attnopt.capture(place)
    program = attnopt.capture(place, trust_pickle=True)
    assert error_of(program(*args), model(*args)) < 1e-5


def test_a_damaged_or_absent_saved_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        attnopt.capture(str(tmp_path / "absent.pt2"), trust_pickle=True)
    damaged = tmp_path / "damaged.pt2"
    damaged.write_text("x")
    with pytest.raises(ValueError, match=r"damaged, or not what torch\.export\.save writes"):
        attnopt.capture(str(damaged), trust_pickle=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "sharded"
    model, _ = build("llama", "sdpa", task="lm")
    model.save_pretrained(directory, max_shard_size="20KB")
    return directory


def test_a_sharded_checkpoint_is_read(sharded: Path) -> None:
    model, kwargs = build("llama", "sdpa", task="lm")
    program = attnopt.capture(str(sharded))
    assert error_of(program(**kwargs).logits, model(**kwargs).logits) < 1e-4


def edit_index(directory: Path, change: Callable[[dict, str], object]) -> None:
    content = json.loads((directory / INDEX).read_text())
    change(content["weight_map"], next(iter(content["weight_map"])))
    (directory / INDEX).write_text(json.dumps(content))


DAMAGES = {
    "a path upwards": (
        lambda d: edit_index(d, lambda names, n: names.update({n: "../x.safetensors"})),
        r"names '\.\./x\.safetensors', which leaves the directory",
    ),
    "an absolute path": (
        lambda d: edit_index(d, lambda names, n: names.update({n: "/x.safetensors"})),
        "leaves the directory",
    ),
    "a name that is none": (
        lambda d: edit_index(d, lambda names, n: names.update({n: 3})),
        "no weight_map from tensor names to file names",
    ),
    "a missing tensor": (
        lambda d: edit_index(d, lambda names, n: names.pop(n)),
        "missing tensors: lm_head.weight; save it again",
    ),
    "an index that is no JSON": (lambda d: (d / INDEX).write_text("{"), "is not JSON"),
    "a file cut off": (
        lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-9]),
        "is damaged or cut off",
    ),
    "a missing file": (lambda d: (d / SHARD).unlink(), "is missing"),
    "a model of another library": (
        lambda d: (d / "config.json").write_text('{"model_type": "other"}'),
        "describes no model of transformers .* 'other'",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_refused_in_one_line(
    tmp_path: Path, sharded: Path, damage: str
) -> None:
    change, message = DAMAGES[damage]
    directory = tmp_path / "damaged"
    shutil.copytree(sharded, directory)
    change(directory)
    with pytest.raises(ValueError, match=message) as caught:
        attnopt.capture(str(directory))
    assert "\n" not in str(caught.value)


def test_generation_goes_by_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    decoder("llama").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "max_new_tokens": 5}')
    config = attnopt.capture(folder).source.generation_config
    assert (config.eos_token_id, config.max_new_tokens) == ([7, 9], 5)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json is not a JSON object"):
        attnopt.capture(folder)


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no such directory, and the Hugging Face hub did not"):
        attnopt.capture("nobody/nothing")
    with pytest.raises(ValueError, match="allowed are such a directory, a hub id"):
        attnopt.capture("./nowhere")
