"""torch.compile with backend "attnopt": what it rewrites, reports and refuses."""

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnopt
from attnopt.backends.dynamo import compile_graph

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    attnopt.compile_report(reset=True)


def compiled(module, **options):
    """Compile as torch.compile(backend="attnopt", options=...) does, without inductor."""

    def backend(graph_module, inputs):
        return compile_graph(graph_module, inputs, options={"inner": "aot_eager", **options})

    return torch.compile(module, backend=backend)


def llama(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=90, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def tokens(rows, length):
    return torch.randint(2, 90, (rows, length), generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """Attention whose weights are returned, which no fused kernel forms."""

    def forward(self, q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
        return weights @ v, weights


class Noisy(nn.Module):
    """Attention with dropout."""

    def forward(self, q, k, v):
        weights = F.dropout(torch.softmax(q @ k.transpose(-1, -2), dim=-1), 0.5, self.training)
        return weights @ v


def qkv():
    return [torch.randn(2, 4, 9, 8) for _ in range(3)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_language_model_is_rewritten_in_few_graphs(attention):
    from torch._dynamo.utils import counters

    model = llama(attention)
    twin = compiled(model)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for length in (13, 5, 17, 33, 21):
            ids = tokens(2, length)
            torch.testing.assert_close(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    assert counters["stats"]["unique_graphs"] - before <= 2
    report = attnopt.compile_report()
    assert report.rewritten == report.found
    assert {(s.module, s.mask.kind) for s in report.found} == {
        (f"model.layers.{i}.self_attn", "causal") for i in range(2)
    }
    assert not report.refused


def test_generation_with_a_compiled_forward_gives_the_same_tokens():
    model = llama()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    way = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **way)
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(ids, **way), want)
    assert not attnopt.compile_report().refused


def test_training_gradients_are_the_same():
    model = llama("eager").train()
    ids = tokens(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled(model)(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-7)
    assert attnopt.compile_report().rewritten


def test_a_miss_warns_raises_or_is_ignored():
    operands = qkv()
    with pytest.warns(UserWarning, match="read elsewhere"):
        out, _ = compiled(Twice())(*operands)
    torch.testing.assert_close(out, Twice()(*operands)[0])
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="read elsewhere"):
        compiled(Twice(), on_miss="raise")(*operands)
    torch._dynamo.reset()
    compiled(Twice(), on_miss="ignore")(*operands)
    assert len(attnopt.compile_report(reset=True).refused) == 3
    assert attnopt.compile_report().found == ()


def test_dropout_that_is_active_is_left_alone():
    operands = qkv()
    with pytest.warns(UserWarning, match="attnopt left 1"):
        compiled(Noisy().train())(*operands)
    torch._dynamo.reset()
    attnopt.compile_report(reset=True)
    torch.testing.assert_close(compiled(Noisy().eval())(*operands), Noisy().eval()(*operands))
    assert len(attnopt.compile_report().rewritten) == 1


def test_a_proof_that_would_take_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("attnopt.backends.dynamo._PROOF_ELEMENTS", 100)
    with pytest.warns(UserWarning, match="would take too long"):
        compiled(Noisy().eval())(*qkv())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plans": "exact"}, "has no option 'plans'"),
        ({"plan": "dha"}, "the plan is 'exact'"),
        ({"on_miss": "shrug"}, "it is 'warn', 'raise' or 'ignore'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        compiled(Noisy().eval(), **options)(*qkv())


def test_the_backend_is_registered_by_its_entry_point_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["torch_dynamo_backends"]["attnopt"].split(":")
    assert getattr(importlib.import_module(module), name) is compile_graph


@torch.no_grad()
def test_numbers_that_dynamo_hands_over_as_inputs_are_constants_with_a_guard():
    model = llama("eager").eval()
    run = torch.compile(model, backend="attnopt", dynamic=True, options={"inner": "eager"})
    given = {"input_ids": tokens(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    # The first queries of the first row see no key.
    given["attention_mask"][0, :5] = 0
    for scaling in (model.model.layers[0].self_attn.scaling, 0.5):
        model.model.layers[0].self_attn.scaling = scaling
        torch.testing.assert_close(run(**given).logits, model(**given).logits, rtol=0, atol=1e-5)
    assert len(attnopt.compile_report().rewritten) == 4
    assert not attnopt.compile_report().refused
