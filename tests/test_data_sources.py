"""Where data comes from: what is read of each source, and the one error of each bad one."""

import itertools
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dha_models import decoder, ids
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import attnopt
from attnopt.data import Source, Split, batches_of, calls, documents, split_for, split_of
from attnopt.data.splitting import is_held_out


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id = None
    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def halves(name: Path | str, rows: int = 500, length: int = 8) -> tuple[bytes, bytes]:
    """Return the text of both halves, as many whole rows as there are."""
    split = split_of(Source(str(name), rows, length), Bytes(), held_out=rows)
    first, second = (bytes(x.flatten().tolist()) for x in (split.calibration, split.held_out))
    return first, second


def text(number: int, size: int = 400) -> str:
    return f"<{number:04}>".ljust(size, "abcdefgh"[number % 8])


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


def vision() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=31,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def program() -> attnopt.Program:
    return attnopt.capture(decoder("llama"), (), {"input_ids": ids(2, 9)})


@pytest.fixture(scope="module")
def image_program() -> attnopt.Program:
    images = torch.rand(2, 1, 8, 8)
    return attnopt.apply(attnopt.capture(vision(), (), {"pixel_values": images}), "exact")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("stdlib", Source("stdlib")),
        ("a/b.jsonl#body:7x9", Source("a/b.jsonl", 7, 9, field="body")),
        ("b.parquet#x", Source("b.parquet", field="x")),
        ("notes#1.txt:4x8", Source("notes#1.txt", 4, 8)),
        ("C:/text", Source("C:/text")),
    ],
)
def test_a_name_is_read(given: str, read: Source):
    assert Source.parse(given) == read
    assert Source.parse(str(read)) == read


def test_lines_of_json_are_documents(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text(i), "no": i} for i in range(80)])
    first, second = halves(path, rows=5000)
    assert len(first) + len(second) == 80 * 400
    assert first[:1] == second[:1] == b"<"


def test_a_field_of_another_name_is_read(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [{"body": text(i)} for i in range(80)])
    source = Source.parse(f"{path}#body:3x16")
    split = split_of(source, Bytes())
    assert split.calibration.shape == (3, 16)
    assert split.source == f"{path}#body:3x16"
    with pytest.raises(ValueError, match=r"a.jsonl:1 has no text in 'text'; it has body: name the"):
        split_of(Source(str(path)), Bytes())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{'text': 1}", "a.jsonl:2 is not JSON"),
        ("[" * 100_000, "a.jsonl:2 is not JSON"),
        ('{"text": 7}', "a.jsonl:2 has no text in 'text'"),
        ("[1]", "a.jsonl:2 has no text in 'text'; it has no fields"),
        ('"' + "x" * 2000 + '"', "a.jsonl:2 is longer"),
    ],
)
def test_a_line_that_is_no_record_is_named(line: str, told: str, tmp_path: Path, monkeypatch):
    if "longer" in told:
        monkeypatch.setattr(documents, "_LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + line)
    with pytest.raises(ValueError, match=told):
        split_of(Source(str(tmp_path / "a.jsonl")), Bytes())


def test_columns_of_parquet_are_documents(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [text(i) for i in range(80)]
    parquet.write_table(pyarrow.table({"body": texts, "no": list(range(80))}), path)
    write_lines(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    split = split_of(Source.parse(f"{path}#body:9x16"), Bytes())
    same = split_of(Source(str(tmp_path / "a.jsonl"), 9, 16), Bytes())
    assert torch.equal(split.calibration, same.calibration)
    assert torch.equal(split.held_out, same.held_out)
    with pytest.raises(ValueError, match=r"has no text in 'text'; it has body, no"):
        split_of(Source(str(path)), Bytes())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="no parquet file that can be read"):
        split_of(Source.parse(f"{path}#body"), Bytes())


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'attnopt\[parquet\]'"):
        split_of(Source(str(tmp_path / "a.parquet")), Bytes())


def test_a_folder_of_records_and_text_is_read(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [{"text": text(i)} for i in range(60)])
    (tmp_path / "one.txt").write_text(text(77, 900))
    first, second = halves(tmp_path, rows=5000)
    assert len(first) + len(second) == 60 * 400 + 896
    assert b"<0077>" in first + second


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path):
    secret, folder = tmp_path / "secret", tmp_path / "folder"
    for place in (secret, folder):
        place.mkdir()
    (secret / "key.txt").write_text("SECRET" * 100)
    for number in range(60):
        (folder / f"{number}.txt").write_text(text(number))
    (folder / "inside.txt").symlink_to(folder / "1.txt")
    (folder / "key.txt").symlink_to(secret / "key.txt")
    (folder / "more").symlink_to(secret)
    os.mkfifo(folder / "pipe.txt")
    first, second = halves(folder, rows=5000)
    assert b"SECRET" not in first + second
    assert len(first) + len(second) == 60 * 400


def test_a_text_of_two_names_is_in_one_half(tmp_path: Path):
    """Whatever the names are dealt to, no text that is held out was calibrated with."""
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(text(number % 50))
    first, second = halves(tmp_path, rows=20_000)
    marks = [{half[i : i + 6] for i in range(0, len(half), 400)} for half in (first, second)]
    assert not marks[0] & marks[1]
    assert len(marks[0]) + len(marks[1]) == 50


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.int32])
def test_whole_numbers_of_npy_are_token_ids(kind: Any, tmp_path: Path):
    array = ids(40, 12).numpy().astype(kind)
    np.save(tmp_path / "rows.npy", array)
    split = split_of(Source(str(tmp_path / "rows.npy")), held_out=6)
    assert torch.equal(split.calibration, ids(40, 12)[:34])
    assert torch.equal(split.held_out, ids(40, 12)[34:])
    np.save(tmp_path / "stream.npy", array.reshape(-1)[:-5])
    split = split_of(Source(str(tmp_path / "stream.npy"), 48, 10), held_out=2)
    assert torch.equal(split.calibration[:1], ids(40, 12).view(-1)[None, :10])
    assert split.calibration.shape == (45, 10)


def canary(path: Path) -> Any:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return (os.mkdir, (str(path),))

    return Bomb()


@pytest.mark.parametrize("name", ["objects.npy", "pickle.npy", "model.pt", "a.npz", "data.pkl"])
def test_pickles_are_refused_and_not_opened(name: str, tmp_path: Path):
    bomb = canary(tmp_path / "fired")
    if name == "objects.npy":
        np.save(tmp_path / name, np.array([bomb, bomb], dtype=object), allow_pickle=True)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="pickle"):
        split_of(Source(str(tmp_path / name)), Bytes())
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((4, 3, 2), np.complex64), "there may be whole numbers"),
        (np.zeros((4, 3)), "there may be whole numbers"),
        (np.full((4, 3), -1), "has -1; ids of tokens are not negative"),
        (np.zeros((1, 3), np.int64), "at least two rows"),
        (np.zeros((4, 3), np.int64), "every row held out is one to calibrate with"),
    ],
)
def test_an_array_of_something_else_is_refused(array: Any, told: str, tmp_path: Path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=told):
        split_of(Source(str(tmp_path / "a.npy")))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"weight": torch.zeros(3)}, "must hold one of input_ids"),
        ({"input_ids": ids(4, 3), "extra": ids(4, 3)}, "holds 'extra'; it may hold"),
        ({"input_ids": ids(4, 3), "labels": torch.zeros(3)}, "and must have as many"),
        ({"input_ids": torch.zeros(4, 3)}, "whole numbers, \\(rows, tokens\\)"),
    ],
)
def test_tensors_of_something_else_are_refused(tensors: Any, told: str, tmp_path: Path):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=told):
        split_of(Source(str(tmp_path / "a.safetensors")))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "no such file or folder"),
        ("pipe", "neither a regular file nor a folder"),
        ("/dev/zero", "neither a regular file nor a folder"),
        ("binary.txt", "is not text"),
        ("broken.safetensors", "no safetensors file that can be read"),
        ("empty.npy", "no array of numbers that can be read"),
        ("huge.npy", "no array of numbers that can be read"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_error(name: str, told: str, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary.txt").write_bytes(b"\0" * 500)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "huge.npy", np.zeros(4, np.int64))
    shown = (tmp_path / "huge.npy").read_bytes().replace(b"(4,), }", b"(9**9,)}")
    (tmp_path / "huge.npy").write_bytes(shown)
    with pytest.raises(ValueError, match=told):
        split_of(Source(name if name.startswith("/") else str(tmp_path / name)), Bytes())


def test_rows_with_padding_and_labels_are_named(tmp_path: Path):
    mask = torch.ones(20, 6, dtype=torch.long)
    save_file({"attention_mask": mask, "input_ids": ids(20, 6)}, tmp_path / "a.safetensors")
    split = split_of(Source(str(tmp_path / "a.safetensors")))
    assert set(split.calibration) == {"input_ids", "attention_mask"}
    assert len(split.held_out["input_ids"]) == 5


class Halving:
    """An image processor: pictures of 8 x 8, halved."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        arrays = [torch.as_tensor(np.array(i)).float().reshape(-1)[:64] for i in images]
        return {"pixel_values": torch.stack(arrays).view(-1, 1, 8, 8) / 2}


def save_pictures(folder: Path, count: int) -> None:
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{number:02}.png")
    np.save(folder / "labels.npy", np.arange(count) % 5)


def test_pictures_pass_the_models_processor(tmp_path: Path):
    save_pictures(tmp_path, 30)
    (tmp_path / "out.png").symlink_to("/etc/hostname")
    split = split_of(Source(str(tmp_path), rows=99), processor=Halving())
    both = torch.cat([split.calibration["labels"], split.held_out["labels"]])
    assert sorted(both.tolist()) == sorted((np.arange(30) % 5).tolist())
    assert split.calibration["pixel_values"].shape[1:] == (1, 8, 8)
    assert float(split.calibration["pixel_values"].max()) > 100
    with pytest.raises(ValueError, match=r"no preprocessor_config.json"):
        split_of(Source(str(tmp_path)))
    np.save(tmp_path / "labels.npy", np.arange(7))
    with pytest.raises(ValueError, match="one whole number for each of 30 rows"):
        split_of(Source(str(tmp_path)), processor=Halving())


def test_a_picture_that_is_none_is_named(tmp_path: Path):
    pytest.importorskip("PIL")
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="png is no PNG or JPEG"):
        split_of(Source(str(tmp_path)), processor=Halving())


def test_pictures_without_pillow_say_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install 'attnopt\[images\]'"):
        split_of(Source(str(tmp_path)), processor=Halving())


def test_pixels_of_npy_are_scaled_or_taken_as_they_are(tmp_path: Path):
    place = tmp_path / "a.npy"
    bytes_ = np.random.default_rng(0).integers(0, 255, (12, 8, 6, 3), dtype=np.uint8)
    np.save(place, bytes_)
    np.save(tmp_path / "labels.npy", np.arange(12))
    split = split_of(Source(str(place)))
    assert split.calibration["pixel_values"].shape == (9, 3, 8, 6)
    assert torch.equal(split.held_out["labels"], torch.tensor([9, 10, 11]))
    want = torch.from_numpy(bytes_[9:]).movedim(-1, 1).float() / 255
    assert torch.equal(split.held_out["pixel_values"], want)
    floats = np.random.default_rng(0).normal(size=(12, 8, 8))
    np.save(place, floats)
    split = split_of(Source(str(place)))
    assert torch.equal(
        split.calibration["pixel_values"], torch.from_numpy(floats[:9]).float()[:, None]
    )


def test_image_models_are_calibrated_and_optimized(image_program, tmp_path: Path):
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = attnopt.calibrate(image_program, images)
    parts = attnopt.calibrate(image_program, (i for i in images.split(5)))
    name = image_program.sites[0].projections["q"].parameter
    # Seventeen tokens would be sixteen patches and the class; here four and one.
    assert whole.counts[whole.owners[name]] == 24 * 5
    assert torch.allclose(whole.gram(name), parts.gram(name))
    np.save(tmp_path / "a.npy", images.numpy())
    result = attnopt.optimize(
        image_program, {"max_drop": "40%"}, "exact", str(tmp_path / "a.npy"), tmp_path / "out"
    )
    assert result.report.task == "classification"
    assert result.report.drop.rows == 6
    assert "other answers" in (tmp_path / "out.rejected/README.md").read_text()


def test_an_iterable_is_read_once_and_needs_no_length(program):
    rows = ids(12, 9)
    read: list[int] = []

    def stream():
        for number, part in enumerate(rows.split(1)):
            read.append(number)
            yield part if number % 2 else {"input_ids": part}

    split = split_for(program, stream())
    assert read == list(range(12))
    assert [len(split.calibration), len(split.held_out)] == [9, 3]
    assert torch.equal(torch.cat([c["input_ids"] for c in split.held_out]), rows[9:])
    assert attnopt.verify(program, program, split).delta_nll.mean == 0
    with pytest.raises(ValueError, match="a generator may have been read before"):
        split_for(program, iter(()))


def test_calls_that_repeat_are_not_held_out(program):
    with pytest.raises(ValueError, match="every call held out is one to calibrate with"):
        split_for(program, (ids(2, 9) for _ in range(8)))


def test_an_endless_iterable_is_refused(program, monkeypatch):
    monkeypatch.setattr(calls, "_MOST_BYTES", 10_000)
    endless = (ids(2, 9) for _ in itertools.count())
    with pytest.raises(ValueError, match=r"itertools\.islice"):
        list(batches_of(program, endless))


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        (7, TypeError, "not int"),
        (["text"], TypeError, "the data holds a str"),
        (torch.full((2, 9), 61), ValueError, "has 61, but the model knows the tokens 0 to 60"),
        (torch.full((2, 9), -1), ValueError, "has -1"),
        ([{"input_ids": torch.rand(2, 9)}], ValueError, "must be whole numbers"),
    ],
)
def test_data_that_a_model_cannot_take_is_refused(data: Any, error: Any, told: str, program):
    with pytest.raises(error, match=told):
        list(batches_of(program, data))


def test_the_standard_library_is_said_to_be_nobodys_domain(program):
    split = Split(ids(2, 9), ids(3, 9), "stdlib:2x9", "")
    report = attnopt.verify(program, program, split)
    assert "Python's own standard library, not text of the model's use" in report.notes[0]
    assert report.content()["data"] == "stdlib:2x9"
    assert not attnopt.verify(program, program, Split(*(ids(3, 9),) * 2, "a.txt:1x9", "")).notes


def test_rows_to_judge_by_are_of_as_many_documents_as_there_are(tmp_path: Path):
    """Rows of one document are alike, and an interval takes them for independent."""
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(text(number, 6) * 500)
    split = split_of(Source(str(tmp_path), 8, 60), Bytes(), held_out=30)
    marks = {bytes(row.tolist())[-12:] for row in split.held_out}
    held = sum(is_held_out(f"{number}.txt") for number in range(400))
    assert len(split.held_out) == 30
    assert split.documents == min(held, 30)
    assert len({mark.split(b"<")[1] for mark in marks}) == split.documents
    assert not split.notes
    few = split_of(Source(str(tmp_path), 8, 20), Bytes(), held_out=100)
    assert few.documents == held
    assert f"100 held-out rows are of {held} documents only" in few.notes[0]
    assert torch.equal(
        few.held_out, split_of(Source(str(tmp_path), 8, 20), Bytes(), held_out=100).held_out
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no tokenizer"),
        ({"tokenizer_config.json": "{}"}, "has no usable tokenizer"),
        ({"tokenizer.json": "{"}, "has no usable tokenizer"),
    ],
)
def test_a_tokenizer_without_words_is_none(files: dict[str, str], says: str, tmp_path: Path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    model.config.name_or_path = str(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        split_for(model, "stdlib:4x16")


def test_pictures_are_no_data_of_a_language_model():
    program = attnopt.capture(decoder("llama"))
    pictures = {"pixel_values": torch.rand(4, 1, 8, 8)}
    with pytest.raises(ValueError, match=r"the data has pixel_values, and .* takes input_ids"):
        next(batches_of(program, pictures))


class Own(torch.nn.Module):
    """A model whose input has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.linear(points)


def test_a_model_of_its_own_names_takes_rows_by_them(tmp_path: Path):
    program = attnopt.capture(Own(), (torch.randn(2, 5, 3),))
    rows = torch.randn(12, 5, 3)
    save_file({"points": rows}, tmp_path / "rows.safetensors")
    split = split_for(program, str(tmp_path / "rows.safetensors"), 3)
    assert torch.equal(split.held_out["points"], rows[9:])
    with pytest.raises(ValueError, match=r"a \.safetensors file of rows of points$"):
        split_for(program, "stdlib:4x16")
    save_file({"dots": rows}, tmp_path / "other.safetensors")
    other = split_for(program, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="the data has dots, and Own takes points"):
        next(batches_of(program, other))


def test_a_model_of_pictures_says_what_it_takes(tmp_path: Path):
    model = vision()
    model.save_pretrained(tmp_path)
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="takes pixel_values, no text; give a folder of images"):
        split_for(model, "stdlib:4x16")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "no such file or folder"),
        ("weights.bin", "an archive or a pickle"),
        ("other.safetensors", "must hold one of input_ids"),
        ("empty", "holds no text"),
    ],
)
def test_data_is_looked_at_before_the_model(name: str, told: str, tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    save_file({"words": ids(8, 9)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=told):
        attnopt.optimize(tmp_path / "no-model", {"params": 0.8}, data=tmp_path / name)


@pytest.mark.parametrize("data", [7, torch.tensor([1, 2, 3]), {"input_ids": [1, 2]}])
def test_data_of_another_kind_is_refused_before_the_model(data: Any, tmp_path: Path):
    with pytest.raises((TypeError, ValueError), match=r"^(the )?data"):
        attnopt.optimize(tmp_path / "no-model", {"params": 0.8}, data=data)
