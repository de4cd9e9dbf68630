"""torch.compile with backend "attnopt": what it rewrites, reports and refuses."""

import importlib
import math
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import attnopt
from attnopt.backends.dynamo import compile_graph

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    attnopt.compile_report(reset=True)


def compiled(module, *, dynamic=None, **options):
    """Compile as torch.compile(backend="attnopt", options=...) does, without inductor."""

    def backend(graph_module, inputs):
        return compile_graph(graph_module, inputs, options={"inner": "aot_eager", **options})

    return torch.compile(module, backend=backend, dynamic=dynamic)


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


class Patched(nn.Module):
    """Attention between patches of four tokens, after as many as fill whole patches are made."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        patches = math.ceil(x.shape[1] / 4)
        whole = F.interpolate(x.mT, size=4 * patches).mT
        within = whole.reshape(x.shape[0], patches, 4, 16).transpose(1, 2).reshape(-1, patches, 16)
        heads = self.qkv(within).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.flatten(1, 2).unbind(0)
        weights = torch.softmax(torch.bmm(q, k.transpose(-1, -2)) / 8**0.5, dim=-1)
        return torch.bmm(weights, v).view(-1, 2, patches, 8).transpose(1, 2).flatten(2)


class Cut(nn.Module):
    """Attention within which dynamo ends a graph, before or after the weights."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * 0.3
        if not self.after:
            torch._dynamo.graph_break()
        weights = torch.softmax(scores + 1.0, dim=-1)
        if self.after:
            torch._dynamo.graph_break()
        return weights @ v


class Layer(nn.Module):
    """A layer that dynamo compiles by itself."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        torch._dynamo.graph_break()
        heads = self.qkv(x).unflatten(-1, (3, self.heads, 16 // self.heads))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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


def test_a_miss_warns_or_is_an_error():
    operands = qkv()
    with pytest.warns(UserWarning, match="read elsewhere"):
        out, _ = compiled(Twice())(*operands)
    torch.testing.assert_close(out, Twice()(*operands)[0])
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="read elsewhere"):
        compiled(Twice(), on_miss="error")(*operands)
    assert len(attnopt.compile_report(reset=True).refused) == 2
    assert attnopt.compile_report().found == ()


def test_dropout_that_is_active_is_left_alone():
    operands = qkv()
    with pytest.warns(UserWarning, match="attnopt left 1"):
        compiled(Noisy().train())(*operands)
    torch._dynamo.reset()
    attnopt.compile_report(reset=True)
    torch.testing.assert_close(compiled(Noisy().eval())(*operands), Noisy().eval()(*operands))
    assert len(attnopt.compile_report().rewritten) == 1


@pytest.mark.parametrize(("after", "where"), [(False, "its scores"), (True, "its weights meet")])
def test_attention_that_dynamo_cut_is_refused(after, where):
    operands = qkv()
    with pytest.warns(UserWarning, match=f"attnopt left .* as they were: .*{where}"):
        out = compiled(Cut(after))(*operands)
    torch.testing.assert_close(out, Cut(after)(*operands))
    report = attnopt.compile_report()
    assert (report.found, len(report.refused)) == ((), 1)
    assert "outside this graph, which was cut within the attention" in report.refused[0].why


def test_a_classifier_of_another_graph_is_no_attention():
    def classes(x):
        torch._dynamo.graph_break()
        return torch.softmax(x * 2, dim=1), torch.softmax(x[..., 0], dim=-1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(classes)(torch.randn(2, 5, 3, 3))
    assert not attnopt.compile_report().refused


def test_layers_that_dynamo_compiles_one_by_one_have_names_of_their_own():
    model = nn.Sequential(Layer(1), Layer(2), Layer(4)).eval()
    twin = compiled(model)
    with torch.no_grad():
        for length in (9, 12):
            x = torch.randn(2, length, 16)
            torch.testing.assert_close(twin(x), model(x))
    report = attnopt.compile_report()
    assert {s.name for s in report.found} == {"model", "model#2", "model#3"}
    assert report.rewritten == report.found


def test_sizes_that_are_rounded_up_are_written():
    model = Patched().eval()
    twin = compiled(model, dynamic=True)
    for length in (13, 22):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(twin(x), model(x))
    report = attnopt.compile_report()
    assert report.rewritten == report.found != ()
    assert not report.refused


def test_a_proof_that_would_take_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("attnopt.backends.dynamo._PROOF_ELEMENTS", 100)
    with pytest.warns(UserWarning, match="would take too long"):
        compiled(Noisy().eval())(*qkv())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plans": "exact"}, "has no option 'plans'; did you mean 'plan'"),
        ({"xyz": 1}, "it has plan, inner, on_miss, explain"),
        ({"plan": "dha"}, "neither 'exact' nor a file of a plan"),
        ({"plan": 3}, "'exact', a Plan, or the file of one"),
        ({"on_miss": "shrug"}, "it is 'warn' or 'error'"),
        ({"explain": "yes"}, "it is True or False"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        compiled(Noisy().eval(), **options)(*qkv())


def plan_of(*choices):
    return attnopt.Plan(tuple(attnopt.Choice(site, name) for site, name in choices))


SITES = tuple(f"model.layers.{i}.self_attn" for i in range(2))


@pytest.mark.parametrize("kept", ["object", "file"])
def test_a_plan_names_the_sites_that_are_rewritten(kept, tmp_path):
    plan = plan_of((SITES[1], "exact"))
    if kept == "file":
        plan.save(tmp_path / "plan.yaml")
        plan = tmp_path / "plan.yaml"
    model, ids = llama("eager"), tokens(2, 9)
    with torch.no_grad():
        out = compiled(model, plan=plan)(input_ids=ids).logits
        torch.testing.assert_close(out, model(input_ids=ids).logits)
    report = attnopt.compile_report()
    assert [s.name for s in report.found] == list(SITES)
    assert [s.name for s in report.rewritten] == [SITES[1]]
    assert not report.refused


def test_a_choice_that_changes_weights_is_refused_with_the_reason():
    plan = plan_of((SITES[0], "dha"), (SITES[1], "exact"))
    with (
        pytest.warns(UserWarning, match=f"{SITES[0]}: pass 'dha' changes weights"),
        torch.no_grad(),
    ):
        compiled(llama(), plan=plan)(input_ids=tokens(2, 9))
    report = attnopt.compile_report()
    assert [s.name for s in report.rewritten] == [SITES[1]]
    assert [no.where for no in report.refused] == [SITES[0]]


def test_a_plan_for_other_sites_is_a_miss():
    with pytest.raises(RuntimeError, match="the plan names none of the 2"):
        compiled(llama(), plan=plan_of(("layers.0", "exact")), on_miss="error")(tokens(2, 9))


def test_explain_says_what_was_found_and_done(capfd):
    with pytest.warns(UserWarning, match="read elsewhere"):
        compiled(Twice(), explain=True)(*qkv())
    with torch.no_grad():
        compiled(llama(), explain=True)(tokens(2, 9))
    told = capfd.readouterr().err
    assert f"attnopt: {SITES[0]}: self, causal, 4 heads of 8 over 2: rewritten" in told
    assert "attnopt: refused: " in told


@pytest.mark.parametrize("window", [None, 6])
def test_a_static_cache_is_written_in_place(window):
    """The cache is longer and shorter than the text; the first row is padded on the left."""
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=90, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    way = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    way |= {"cache_implementation": "static", "disable_compile": True}
    want = model.generate(ids, **way)
    model.forward = compiled(model.forward, on_miss="error")
    assert torch.equal(model.generate(ids, **way), want)
    report = attnopt.compile_report()
    assert report.rewritten == report.found
    assert len(report.found) >= 4


class Accumulates(nn.Module):
    """Attention beside a buffer that is written in place, maybe through a view."""

    def __init__(self, *, through_view):
        super().__init__()
        self.register_buffer("total", torch.zeros(4, 8))
        self.through_view = through_view

    def forward(self, q, k, v):
        total = self.total[1:3] if self.through_view else self.total
        total.add_(1.0)
        total.mul_(2.0)
        return F.scaled_dot_product_attention(q, k, v) + self.total.sum()


@pytest.mark.parametrize("through_view", [False, True])
def test_writes_are_kept_or_the_graph_is_left_alone(through_view):
    operands = qkv()
    stock, twin = (Accumulates(through_view=through_view) for _ in range(2))
    run = compiled(twin)
    for _ in range(2):
        if through_view:
            with pytest.warns(UserWarning, match="that other tensors share"):
                got = run(*operands)
            torch._dynamo.reset()
        else:
            got = run(*operands)
        torch.testing.assert_close(got, stock(*operands))
        torch.testing.assert_close(twin.total, stock.total)
    assert bool(attnopt.compile_report().rewritten) is not through_view


class MasksInPlace(nn.Module):
    """Attention that writes its mask into the scores, after another tensor took their size."""

    def forward(self, q, k, v, hidden):
        scores = q @ k.transpose(-1, -2)
        scores.masked_fill_(hidden[:, None, None].expand_as(scores), -1e9)
        return torch.softmax(scores, dim=-1) @ v


def test_a_write_is_taken_out_where_another_tensor_has_only_the_size():
    operands = (*qkv(), torch.arange(9).expand(2, -1) > 6)
    got = compiled(MasksInPlace())(*operands)
    torch.testing.assert_close(got, MasksInPlace()(*operands))
    assert len(attnopt.compile_report().rewritten) == 1


class AddsToAView(nn.Module):
    """Attention that adds a bias to a view of scores, which may be read again as a whole."""

    def __init__(self, *, again):
        super().__init__()
        self.again = again

    def forward(self, q, k, v, bias):
        whole = q @ k.transpose(-1, -2)
        scores = whole.unsqueeze(0).squeeze(0)
        scores += bias
        out = torch.softmax(scores, dim=-1) @ v
        return (out, whole) if self.again else out


@pytest.mark.parametrize("again", [False, True])
def test_a_write_into_a_view_is_taken_out_where_the_whole_is_read_no_more(again):
    operands = (*qkv(), torch.randn(9, 9))
    module = AddsToAView(again=again)
    if again:
        with pytest.warns(UserWarning, match="that other tensors share"):
            got = compiled(module)(*operands)
    else:
        got = compiled(module)(*operands)
    torch.testing.assert_close(got, module(*operands))
    assert bool(attnopt.compile_report().rewritten) is not again


def test_attention_beside_a_scan_of_mapped_steps_is_rewritten():
    def step(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    def mixed(q, k, v):
        _, states = associative_scan(step, (q.sigmoid(), v), 2, combine_mode="generic")
        return F.scaled_dot_product_attention(q, k, states)

    operands = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(mixed)(*operands), mixed(*operands))
    assert len(attnopt.compile_report().rewritten) == 1


@pytest.mark.slow
def test_attention_of_blocks_takes_sizes_that_it_cannot_be_tried_at():
    model, kwargs, _ = zoo.build("big_bird_sparse")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(model, backend="attnopt", dynamic=True, options={"inner": "eager"})
        torch.testing.assert_close(got(**kwargs)[0], model(**kwargs)[0])


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


class WritesSlices(nn.Module):
    """Attention whose queries are changed slice by slice; a view from before may be read after."""

    def __init__(self, *, watched):
        super().__init__()
        self.watched = watched

    def forward(self, q, k, v, w):
        queries = q * w
        before = queries[:, :, 1:]
        queries[..., 4:] *= 2.0
        queries[:, 0, 2:5] = k[:, 0, 2:5]
        # What may be a copy, or the same memory under another name that nobody reads.
        turned = (q - k).transpose(1, 2).contiguous()
        turned[..., 0] += 3.0
        top, index = torch.topk(v, 3, dim=-1)
        top /= top.sum(dim=-1, keepdim=True)
        out = F.scaled_dot_product_attention(queries, k, v) + top.sum() + index.sum()
        out = out + turned.sum()
        return (out + before.sum() if self.watched else out), queries


@pytest.mark.parametrize("watched", [False, True])
def test_writes_into_slices_are_taken_out_unless_another_name_shows_them(watched):
    operands = (*qkv(), torch.randn(8))
    module = WritesSlices(watched=watched)
    if watched:
        with pytest.warns(UserWarning, match="that other tensors share"):
            got = compiled(module)(*operands)
    else:
        got = compiled(module)(*operands)
    for found, want in zip(got, module(*operands), strict=True):
        torch.testing.assert_close(found, want)
    assert len(attnopt.compile_report().rewritten) == (0 if watched else 1)
