"""The report of an artifact: JSON that its schema describes, and a page that anyone can read."""

import copy
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import browser
import pytest
from dha_models import decoder, ids
from json_schema import problems

import attnopt
from attnopt.artifacts.saving import report_of
from attnopt.reporting import content_of, page, schema
from attnopt.reporting.markup import Markup, tag

VOID = {"meta", "br"}
HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>&\"'"
SVG_NUMBERS = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "fill-opacity"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Optimize a tiny decoder; return the result and its artifact."""
    root = tmp_path_factory.mktemp("report")
    decoder("llama").save_pretrained(root / "tiny")
    goal = {"kv_cache": "50%", "max_drop": "100%"}
    result = attnopt.optimize(str(root / "tiny"), goal, data=ids(40, 24), out=root / "out")
    return result, root / "out"


@pytest.fixture(scope="module")
def report(made) -> dict[str, Any]:
    return json.loads((made[1] / "attnopt/report.json").read_text())


@pytest.fixture(scope="module")
def environment(made) -> dict[str, Any]:
    return json.loads((made[1] / "attnopt/env.json").read_text())


@pytest.fixture
def full(report) -> dict[str, Any]:
    """A report that has every section."""
    points = [
        {"cost": 0.25, "damage": 0.2, "chosen": False, "label": "all fused"},
        {"cost": 0.5, "damage": 0.03, "chosen": True, "label": "mixed"},
        {"cost": 0.5, "damage": 0.05, "chosen": False, "label": "windows"},
    ]
    found = copy.deepcopy(report)
    found["pareto"] = points
    found["measured"]["latency"] = {"a step": [0.004, 0.003]}
    found["costs"].append({"name": "a step", "unit": "seconds", "before": 0.004, "after": 0.003})
    found["found"]["near_misses"] = [{"module": "mixer", "node": "softmax_3", "why": "no product"}]
    found["found"]["uncaptured"] = [{"module": "gate", "why": "branches", "where": "m.py:3"}]
    found["quality"]["notes"] = ["judged on Python's own standard library"]
    return found


class Structure(HTMLParser):
    """What a page is made of; a tag that is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.attributes += [(name, key, value or "") for key, value in attributes]
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_is_what_its_schema_says(report, full):
    assert problems(report, schema(), schema()) == []
    assert problems(full, schema(), schema()) == []
    assert report["schema"] == schema()["$id"] == "attnopt.report/1"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("accepted",), "yes"),
        (("schema",), "attnopt.report/2"),
        (("quality", "drop", "ci95"), [0.1]),
        (("costs", 0, "unit"), "furlongs"),
        (("found", "sites", 0, "heads"), -1),
        (("changed", 0, "pass"), None),
        (("surprise",), 1),
        (("importance", "sites", 0, "scores"), []),
    ],
)
def test_the_schema_refuses_what_is_no_report(report, path, value):
    wrong = copy.deepcopy(report)
    inner = wrong
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    assert any("/".join(map(str, path)) in p for p in problems(wrong, schema(), schema()))


def test_the_report_says_what_was_found_changed_and_measured(made, report):
    assert [s["name"] for s in report["found"]["sites"]] == [c["site"] for c in report["changed"]]
    assert len(report["found"]["mlps"]) == 2
    stats, costs = made[0].plan.statistics, {c["name"]: c for c in report["costs"]}
    assert costs["cache a token"]["after"] == 256
    files = costs["weight files"]
    assert files["after"] == (made[1] / "model.safetensors").stat().st_size < files["before"]
    scores = report["importance"]["sites"][0]["scores"]
    wanted = stats.contribution("model.layers.0.self_attn.o_proj.weight")
    assert scores == pytest.approx(wanted.tolist())
    assert len(report["samples"]) == 2
    assert 0 < len(report["samples"][0]["before"].split()) <= 24


def test_the_page_is_made_of_the_two_json_files_alone(made, report, environment):
    assert (made[1] / "attnopt/report.html").read_text() == page(report, environment)
    words = " ".join(Structure(page(report, environment)).words)
    for part in ("Accepted", "2 attentions and 2 MLPs", "dha", "Python", "torch", "rewritten"):
        assert part in words


def test_the_page_is_whole_and_asks_nobody_for_anything(full, environment):
    found = Structure(page(full, environment))
    assert found.tags.count("svg") == len(full["costs"]) + 4
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(found.tags)
    for _, key, value in found.attributes:
        assert key not in ("src", "href", "style", "srcset", "action")
        assert not key.startswith("on")
        assert "//" not in value
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    styles = [w for w in found.words if "@media" in w]
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]


def test_every_number_of_a_picture_is_one(full, environment):
    numbers = [
        value
        for name, key, value in Structure(page(full, environment)).attributes
        if key in SVG_NUMBERS and name != "meta"
    ]
    assert len(numbers) > 50
    assert all(math.isfinite(float(value)) for value in numbers)


def test_what_a_model_says_is_text_and_nothing_else(full, environment):
    hostile = poisoned(full, {"schema", "unit", "is"})
    plain, found = (
        Structure(page(r, e))
        for r, e in ((full, environment), (hostile, poisoned(environment, set())))
    )
    assert sorted(found.tags) == sorted(plain.tags)
    assert {key for _, key, _ in found.attributes} == {key for _, key, _ in plain.attributes}
    assert "<script>alert(1)</script>" in "".join(found.words)


def poisoned(value: Any, kept: set[str], name: str = "") -> Any:
    """Put a hostile text in place of every text."""
    if isinstance(value, dict):
        return {key: poisoned(inner, kept, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, kept, name) for inner in value]
    if not isinstance(value, str) or name in kept:
        return value
    return "\n".join(HOSTILE for _ in value.split("\n"))


def test_what_cannot_be_shown_is_marked():
    assert tag("p", "a\x00b\u202ec\ud800<") == "<p>a\ufffdb\ufffdc\ufffd&lt;</p>"
    assert tag("p", Markup("<b>x</b>"), title='"') == '<p title="&quot;"><b>x</b></p>'
    with pytest.raises(ValueError, match="cannot be drawn"):
        tag("rect", x=math.nan)


def test_a_drop_that_is_no_number_is_shown_without_a_picture(report, environment):
    broken = copy.deepcopy(report)
    broken["quality"]["drop"] = {"mean": None, "ci95": [None, None]}
    broken["accepted"] = False
    found = Structure(page(broken, environment))
    assert found.tags.count("svg") == len(report["costs"]) + 2
    assert any("Rejected" in word for word in found.words)


def test_long_lists_end_with_how_many_there_are(report, environment):
    long = copy.deepcopy(report)
    long["refused"] = [f"site {i}: why" for i in range(100)]
    words = " ".join(Structure(page(long, environment)).words)
    assert "site 59: why" in words
    assert "and 40 more" in words
    assert "site 60: why" not in words


def test_a_planner_hands_its_front_over(made):
    result, _ = made
    points = [{"cost": 0.5, "damage": 0.1, "chosen": True}]
    searched = replace(result.plan, search=SimpleNamespace(points=points))
    told = content_of(replace(result, plan=searched))
    assert told["pareto"] == [{"cost": 0.5, "damage": 0.1, "chosen": True, "label": ""}]
    told = content_of(replace(result, measured={"pareto": points}))
    assert told["pareto"][0]["chosen"] is True
    assert problems(told, schema(), schema()) == []


def test_a_program_saved_as_it_is_has_no_page(made, tmp_path: Path):
    out = attnopt.save(made[0].program, tmp_path / "plain")
    assert not (out / "attnopt/report.html").exists()
    report = json.loads((out / "attnopt/report.json").read_text())
    assert problems(report, schema(), schema()) == []
    assert "found" not in report


def test_a_module_of_ones_own_has_a_page_too(environment):
    result = attnopt.optimize(
        attnopt.capture("cli_models:blocks"),
        plan="exact",
        data=ids(8, 7 * 24).view(8, 7, 24) / 61.0,
    )
    report = report_of(result)
    assert problems(json.loads(json.dumps(report)), schema(), schema()) == []
    words = " ".join(Structure(page(report, environment)).words)
    assert "2 attentions" in words
    assert "Nothing was changed" in words


@pytest.mark.skipif(browser.found() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_a_browser_shows_the_page_without_a_complaint(
    full, environment, tmp_path: Path, width: int, scheme: str
):
    place = tmp_path / "report.html"
    place.write_text(page(full, environment))
    with browser.browser(tmp_path / "profile") as shown:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        shown("Emulation.setDeviceMetricsOverride", **size)
        scheme_of = {"name": "prefers-color-scheme", "value": scheme}
        shown("Emulation.setEmulatedMedia", features=[scheme_of])
        shown.open(place)
        assert shown.complaints == []
        assert shown.requests == [place.as_uri()]
        boxes = shown.value(
            "[...document.querySelectorAll('svg, svg rect, svg circle')].map(e => {"
            "const b = e.getBoundingClientRect(); return [e.tagName, b.width, b.height]})"
        )
        assert len(boxes) > 20
        assert all(w > 0 and h > 0 for _, w, h in boxes), boxes
        assert shown.value("document.documentElement.scrollWidth") <= width
        paper = shown.value("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
