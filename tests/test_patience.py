"""Traces whose sizes grow without end are given up, and the model is captured without them."""

import threading

import fuzz
import pytest
import sympy
from fuzz_grammar.cases import CAPTURED, Case
from fuzz_grammar.spec import Spec, repair

import attnopt
from attnopt.frontend import patience as module
from attnopt.frontend.patience import MOST_OPERATIONS, SizesTooLongError, patience

SIZES = sympy.symbols(f"s:{MOST_OPERATIONS + 2}", integer=True, positive=True)
SHORT, LONG = sympy.Add(*SIZES[:-1]), sympy.Add(*SIZES)


def test_a_long_size_ends_the_trace_and_a_short_one_does_not():
    simplify = sympy.simplify
    with patience():
        assert sympy.simplify(SHORT) == SHORT
        with pytest.raises(SizesTooLongError, match=f"takes {MOST_OPERATIONS + 1} operations"):
            sympy.simplify(LONG)
    assert sympy.simplify is simplify
    assert sympy.simplify(LONG) == LONG


def test_other_threads_are_left_alone():
    done = []
    with patience():
        other = threading.Thread(target=lambda: done.append(sympy.simplify(LONG) == LONG))
        other.start()
        other.join()
    assert done == [True]


def test_windows_within_windows_are_captured_at_one_size_of_image(monkeypatch):
    # Of 300 operations the last takes ten seconds; without an end, hours.
    monkeypatch.setattr(module, "MOST_OPERATIONS", 40)
    spec = repair(
        Spec(
            kv_heads=1,
            groups=2,
            layout="mqa_folded",
            gqa="broadcast",
            partition="window",
            stack="sequential",
            layers=3,
        )
    )
    case = Case(0, 0, spec=spec)
    with fuzz.limited(fuzz.TIMEOUT):
        program = attnopt.capture(case.module, (), case.inputs(CAPTURED, 0))
    assert len(program.sites) == 3
    assert fuzz.attention_nodes(attnopt.apply(program, "exact")) == 3
