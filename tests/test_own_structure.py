"""Models that hide keys by themselves: chunks, windows with sinks or soft caps, documents."""

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

import attnopt
from attnopt.ops import attention, window_attention

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2,
}  # fmt: skip
STEPS = (5, 1, 1, 1, 10, 1, 1, 20)


def llama4(chunk=8):
    config = Llama4TextConfig(
        **SHAPE, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1,
        attention_chunk_size=chunk, interleave_moe_layer_step=2, no_rope_layers=[1, 0],
    )  # fmt: skip
    return made(Llama4ForCausalLM, config)


def gpt_oss():
    config = GptOssConfig(
        **SHAPE, num_local_experts=2, num_experts_per_tok=1, sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return made(GptOssForCausalLM, config)


def gemma2():
    config = Gemma2Config(
        **SHAPE, sliding_window=7, attn_logit_softcapping=3.0, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return made(Gemma2ForCausalLM, config)


def made(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


FAMILIES = {"llama4": (llama4, 8), "gpt_oss": (gpt_oss, 7), "gemma2": (gemma2, 7)}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def rewritten(request):
    make, kept = request.param
    source = make()
    return source, attnopt.apply(attnopt.capture(source, (ids()[:, :9],)), "exact"), kept


def ids():
    return torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def padding(left):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :left] = 0
    return mask


def stepped(model, mask):
    """Return the logits of a text that comes in pieces, and the last cache."""
    cache, found, seen = None, [], 0
    for count in STEPS:
        out = model(
            ids()[:, seen : seen + count], past_key_values=cache,
            attention_mask=mask[:, : seen + count], use_cache=True,
        )  # fmt: skip
        cache, seen = out.past_key_values, seen + count
        found.append(out.logits)
    return torch.cat(found, dim=1), cache


def test_a_layer_keeps_no_more_than_it_sees(rewritten):
    _, program, kept = rewritten
    assert not program.refused
    rings = {s.layer: s.shape[2] for s in program.states if s.ring}
    assert rings == {0: kept}
    assert {s.layer for s in program.states if s.grows == 2} == {1}
    targets = [n.target for n in program.graph.nodes]
    assert (targets.count(window_attention), targets.count(attention)) == (1, 1)


@pytest.mark.parametrize("left", [0, 3, 13])
def test_what_is_kept_goes_on_as_the_whole_text_does(rewritten, left):
    source, program, _ = rewritten
    mask = padding(left)
    model = attnopt.lower(program, "eager")
    with torch.no_grad():
        wanted = source(ids(), attention_mask=mask).logits
        for found in (program(ids(), attention_mask=mask).logits, stepped(model, mask)[0]):
            torch.testing.assert_close(found[0, left:], wanted[0, left:], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=2e-5)


def test_the_source_generates_the_same(rewritten):
    source, program, _ = rewritten
    mask = padding(5)[:, :12]
    model = attnopt.lower(program, "eager")
    given = {"max_new_tokens": 22, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids()[:, :12], attention_mask=mask, **given)
    assert torch.equal(found, source.generate(ids()[:, :12], attention_mask=mask, **given))
    grown = attnopt.lower(program.growing, "eager")
    assert torch.equal(found, grown.generate(ids()[:, :12], attention_mask=mask, **given))


@pytest.mark.parametrize("first", [6, 8, 21])
def test_a_cache_of_the_source_is_taken_over(rewritten, first):
    source, program, _ = rewritten
    model = attnopt.lower(program, "eager")
    with torch.no_grad():
        wanted = source(ids()).logits
        past = source(ids()[:, :first], use_cache=True).past_key_values
        rest = model(ids()[:, first:], past_key_values=past).logits
    torch.testing.assert_close(rest, wanted[:, first:], rtol=1e-4, atol=2e-5)


def test_no_call_goes_by_the_slow_definition(rewritten, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the reference was called")

    source, program, _ = rewritten
    model = attnopt.lower(program, "eager")
    monkeypatch.setattr("attnopt.ops.sdpa.attention_reference", refuse)
    with torch.no_grad():
        wanted = source(ids()).logits
        torch.testing.assert_close(model(ids()).logits, wanted, rtol=1e-4, atol=2e-5)


def test_a_window_that_is_longer_than_the_example_moves_with_padding():
    """Chunks of more tokens than the capture saw are counted from the first real token, too."""
    source = llama4(chunk=25)
    program = attnopt.apply(attnopt.capture(source, (ids()[:, :5],)), "exact")
    mask = padding(13)
    with torch.no_grad():
        wanted = source(ids(), attention_mask=mask).logits
        found = program(ids(), attention_mask=mask).logits
    torch.testing.assert_close(found[0, 13:], wanted[0, 13:], rtol=1e-4, atol=2e-5)


class Packed(nn.Module):
    """Texts one after the other in a row; tokens see those before them in their own."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(97, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, tokens, document):
        x = self.embed(tokens)
        place = torch.arange(tokens.shape[1])
        seen = (document[:, :, None] == document[:, None]) & (place[:, None] >= place)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
            x = x + out(found.transpose(1, 2).flatten(2))
        return x


def packed(lengths):
    """Return the number of its text for each token."""
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths]
    )


def test_documents_are_read_one_by_one(monkeypatch):
    torch.manual_seed(0)
    source = Packed().double().eval()
    small = packed([[4, 5], [2, 7]])
    program = attnopt.apply(attnopt.capture(source, (ids()[:, :9], small)), "exact")
    assert not program.refused
    document = packed([[300, 80, 220], [130, 270, 200]])
    tokens = torch.randint(0, 97, document.shape)
    pairs = []
    kernel = nn.functional.scaled_dot_product_attention

    def counted(q, k, *args, **options):
        pairs.append(q.shape[2] * k.shape[2] * q.shape[0])
        return kernel(q, k, *args, **options)

    model = attnopt.lower(program, "eager")
    with torch.no_grad():
        wanted = source(tokens, document)
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
        torch.testing.assert_close(model(tokens, document), wanted)
    assert sum(pairs) < 0.4 * 2 * 2 * 600 * 600
