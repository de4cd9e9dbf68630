"""Files written tensor by tensor are those of safetensors, byte by byte, and are read back."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnopt.tensorfiles import Described, TensorFile, put, write_tensors
from attnopt.weights import Spool, described, fingerprint, spread


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    real = torch.randn(5, 7)
    return {
        "b.weight": real,
        "a.weight": real.to(torch.bfloat16),
        "half": real.half(),
        "double": real.double(),
        "ids": torch.arange(11),
        "small": torch.arange(3, dtype=torch.int32),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
        "eight": real.to(torch.float8_e4m3fn),
        "five": real.to(torch.float8_e5m2),
        "complex": torch.randn(3, dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "ümlaut": torch.ones(1),
    }


def test_the_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    held = tensors()
    save_file(held, tmp_path / "theirs.safetensors", {"format": "pt"})
    put(tmp_path / "ours.safetensors", held, {"format": "pt"})
    ours, theirs = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("ours", "theirs"))
    assert ours == theirs


def test_every_tensor_is_read_back(tmp_path: Path) -> None:
    held = tensors()
    save_file(held, tmp_path / "x.safetensors", {"note": "é"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert sorted(file) == sorted(held)
    assert file.notes == {"note": "é"}
    for name, tensor in held.items():
        found = file[name]
        assert file.describe(name) == Described.of(tensor)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert torch.equal(file.sample("ids", 3, 4), torch.arange(3, 7))


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    place = tmp_path / "x.safetensors"
    put(place, {"w": torch.zeros(3)}, {})
    file = TensorFile(place)
    assert file["w"].tolist() == [0, 0, 0]
    put(place, {"first": torch.zeros(9), "w": torch.ones(2)}, {})
    assert file["w"].tolist() == [1, 1]


@pytest.mark.parametrize("offsets", [[0, 9], [-8, 0], [0, 400], [4, 12]])
def test_a_header_that_lies_is_refused(offsets: list[int], tmp_path: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    place = tmp_path / "x.safetensors"
    place.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(ValueError, match="no safetensors file"):
        TensorFile(place)["w"]


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\xff" * 40, b"\2\0\0\0\0\0\0\0[]")):
        place = tmp_path / f"{number}.safetensors"
        place.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file"):
            list(TensorFile(place))


def test_a_tensor_of_another_shape_than_promised_is_an_error(tmp_path: Path) -> None:
    told = {"w": Described((2,), torch.float32)}
    with pytest.raises(ValueError, match="w is"):
        write_tensors(tmp_path / "x.safetensors", told, lambda _: torch.zeros(3))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "x.safetensors"
    put(place, {"w": torch.ones(2)}, {})
    with pytest.raises(KeyError):
        put(place, {"w": torch.ones(2, dtype=torch.complex128)}, {})
    assert load_file(place)["w"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_spool_holds_what_it_was_given_in_memory_or_on_disk() -> None:
    for most in (0, 10**6, 300):
        spool = Spool(most)
        held = {f"w{i}": torch.full((8, 8), float(i)) for i in range(4)}
        spool.update(held)
        spool["w0"] = torch.ones(2, dtype=torch.bfloat16)
        held["w0"] = torch.ones(2, dtype=torch.bfloat16)
        assert (spool.folder is None) == (most == 10**6)
        assert dict(spool.items()).keys() == held.keys()
        assert all(torch.equal(spool[name], held[name]) for name in held)
        assert described(spool, "w0") == Described((2,), torch.bfloat16)
        del spool["w1"]
        assert "w1" not in spool
        assert len(spool) == 3
        folder = spool.folder
        del spool
        assert folder is None or not folder.exists()


def test_a_fingerprint_tells_weights_apart() -> None:
    weights = {"a": torch.zeros(100, 1000), "b": torch.arange(5)}
    assert fingerprint(weights) == fingerprint({n: t.clone() for n, t in weights.items()})
    others = (
        {**weights, "b": torch.arange(1, 6)},
        {**weights, "a": torch.zeros(1000, 100)},
        {**weights, "a": torch.zeros(100, 1000) + 1e-3},
        {**weights, "c": torch.zeros(0)},
    )
    assert len({fingerprint(w) for w in (weights, *others)}) == 5


def test_stretches_reach_from_end_to_end() -> None:
    assert spread(10, 2, 8) == [(0, 10)]
    assert spread(100, 3, 10) == [(0, 10), (45, 10), (90, 10)]
