"""What is measured of models that are too large to be held twice in memory."""

from typing import Any

import pytest
from dha_models import decoder, exactly, ids

import attnopt
from attnopt import optimizing
from attnopt.nouns import Choice


@pytest.mark.parametrize("family", ["llama_gqa", "glm"])
def test_a_large_model_is_measured_without_its_stock_class(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = exactly(decoder(family))
    stats = attnopt.calibrate(program, ids(4, 20))
    told = {"kv_heads": 2, "refit": False}
    choices = tuple(Choice(s.name, "dha", told) for s in program.sites)
    rewritten = attnopt.apply(program, attnopt.Plan(choices, statistics=stats))
    small: dict[str, Any] = optimizing.measure(rewritten, program, ids(4, 20))
    assert "stock_error" in small
    monkeypatch.setattr(optimizing, "_LARGEST", 1000)
    monkeypatch.setattr(optimizing, "stock_model", lambda _: 1 / 0)
    large = optimizing.measure(rewritten, program, ids(4, 20))
    assert large["kv_bytes_per_token"] == small["kv_bytes_per_token"]
    assert "not compared" in large["stock"]
    assert "stock_error" not in large
