"""Levels, graph dumps and progress listeners of attnopt.debug."""

import contextvars
from pathlib import Path

import pytest
from torch import fx, nn

from attnopt import debug


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNOPT_DEBUG", raising=False)
    monkeypatch.delenv("ATTNOPT_DUMP", raising=False)


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Linear(2, 3))


def test_nothing_is_said_by_default(capsys: pytest.CaptureFixture[str]):
    debug.log(1, "a message")
    assert capsys.readouterr().err == ""


def test_a_message_shows_from_its_level_on(capsys: pytest.CaptureFixture[str]):
    with debug.debug(3):
        debug.log(3, "a rule fired")
        debug.log(4, "a near miss")
    assert capsys.readouterr().err == "attnopt[3] a rule fired\n"


def test_a_message_that_is_not_wanted_is_not_made():
    debug.log(1, lambda: pytest.fail("made for nobody"))


def test_the_environment_sets_the_level(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTNOPT_DEBUG", "2")
    assert debug.level() == 2
    with debug.debug(0):
        assert debug.level() == 0
    assert debug.level() == 2


@pytest.mark.parametrize("text", ["seven", "7", "-1"])
def test_a_level_that_does_not_exist_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTNOPT_DEBUG", text)
    with pytest.raises(ValueError, match="0 to 6"):
        debug.level()


def test_another_context_keeps_its_own_level():
    outside = contextvars.copy_context()
    with debug.debug(5):
        assert outside.run(debug.level) == 0


def test_no_graph_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with debug.debug(4):
        debug.dump(0, "capture", traced())
    assert list(tmp_path.iterdir()) == []


def test_a_graph_is_written_as_python_named_for_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ATTNOPT_DUMP", str(tmp_path / "graphs"))
    debug.dump(0, "capture", traced())
    debug.dump(10, "normalize/decode part", traced())
    written = sorted(file.name for file in (tmp_path / "graphs").iterdir())
    assert written == ["00-capture.py", "10-normalize-decode-part.py"]
    compile((tmp_path / "graphs" / written[0]).read_text(), written[0], "exec")


def test_level_five_writes_graphs_to_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with debug.debug(5):
        debug.dump(0, "capture", traced())
    assert (tmp_path / "attnopt-dump" / "00-capture.py").is_file()


def test_a_stage_logs_its_time(capsys: pytest.CaptureFixture[str]):
    with debug.debug(2), debug.timed("find"):
        pass
    assert capsys.readouterr().err.startswith("attnopt[2] find: 0.0")


def test_steps_reach_the_innermost_listener_only():
    outer: list[tuple[str, int, int]] = []
    inner: list[tuple[str, int, int]] = []
    debug.advance("prove", 0, 3)
    with debug.listening(lambda *step: outer.append(step)):
        with debug.listening(lambda *step: inner.append(step)):
            debug.advance("prove", 1, 3)
        debug.advance("prove", 2, 3)
    assert (outer, inner) == ([("prove", 2, 3)], [("prove", 1, 3)])
