"""A mistake of our own at one attention: it stays as it is and says so, the others are done."""

import fuzz
import pytest
import torch
from fuzz_grammar.cases import Case
from fuzz_grammar.spec import Spec, repair
from torch import nn

import attnopt
from attnopt import rewriting
from attnopt.finder import finding
from attnopt.finder.faults import FAULT
from attnopt.finder.prove import prove

TWO = Case(0, 0, spec=repair(Spec(stack="sequential", layers=2)))


class Unlike(nn.Module):
    """Two attentions that are not alike: the second has a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(0.25), Half(0.75)

    def forward(self, x):
        return self.second(self.first(x))


class Half(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.q = nn.Linear(16, 16)

    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], 4, 4).transpose(1, 2)
        weights = torch.softmax(q @ q.transpose(-1, -2) * self.scale, dim=-1)
        return (weights @ q).transpose(1, 2).flatten(2)


def failing(work, where):
    """Fail in module `second` as a mistake in the finder would."""

    def step(*arguments):
        subject = next(x for x in arguments if hasattr(x, where))
        node = getattr(subject, where)
        if "second" in str(node.meta["nn_module_stack"]):
            raise IndexError("index 7 is out of bounds")
        return work(*arguments)

    return step


def captured():
    return attnopt.capture(Unlike().eval(), (torch.randn(2, 5, 16),))


def test_an_attention_whose_proof_fails_stays_and_the_other_is_rewritten(monkeypatch):
    monkeypatch.setattr(rewriting, "prove", failing(prove, "anchor"))
    program = captured()
    exact = attnopt.apply(program, "exact")
    (refusal,) = exact.refused
    assert FAULT in refusal.why
    assert "IndexError: index 7 is out of bounds, test_faults.py:" in refusal.why
    assert fuzz.attention_nodes(exact) == 1
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(exact(x), program(x))


@pytest.mark.parametrize(("step", "where"), [("match_anchor", "weights"), ("_read", "anchor")])
def test_an_attention_that_cannot_be_read_is_a_near_miss(monkeypatch, step, where):
    real = getattr(finding, step)
    if step == "_read":
        failed = failing(lambda piece, *rest: real(*rest), where)
        monkeypatch.setattr(finding, step, lambda view, g, *rest: failed(g[0], view, g, *rest))
    else:
        monkeypatch.setattr(finding, step, failing(real, where))
    program = captured()
    assert [site.module for site in program.sites] == ["first"]
    (miss,) = (miss for miss in program.near_misses if FAULT in miss.why)
    assert miss.module == "second"
    assert fuzz.attention_nodes(attnopt.apply(program, "exact")) == 1


def test_an_attention_that_is_assembled_from_pieces_says_what_failed_too(monkeypatch):
    def fails(*_):
        raise IndexError("index 7 is out of bounds\nand more of it")

    zoo = pytest.importorskip("zoo", reason="the model zoo is not here")
    monkeypatch.setattr(rewriting, "match_region", fails)
    model, kwargs, _ = zoo.build("longformer", "eager")
    exact = attnopt.apply(attnopt.capture(model, (), kwargs), "exact")
    assert exact.refused
    assert all(
        "IndexError: index 7 is out of bounds, test_faults" in no.why for no in exact.refused
    )


def test_a_compiled_model_runs_and_warns(monkeypatch):
    monkeypatch.setattr(rewriting, "prove", failing(prove, "anchor"))
    attnopt.compile_report(reset=True)
    torch._dynamo.reset()
    module, x = Unlike().eval(), torch.randn(2, 5, 16)
    compiled = torch.compile(module, backend="attnopt", options={"inner": "eager"})
    with pytest.warns(UserWarning, match=FAULT), torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    report = attnopt.compile_report(reset=True)
    assert (len(report.found), len(report.rewritten)) == (2, 1)


def test_the_fuzzer_counts_it_as_a_crash(monkeypatch):
    def fails(*_):
        raise IndexError("index 7 is out of bounds")

    monkeypatch.setattr(rewriting, "prove", fails)
    result = fuzz.check(TWO)
    assert result.categories == {"crash"}
    assert result.failed
