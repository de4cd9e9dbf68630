"""Lowered modules: the source's call, parameters of their own, and generation."""

from functools import cache

import pytest
import torch
import zoo
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

import attnopt

SMALL = {"vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, **SMALL,
}  # fmt: skip


def llama():
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))


def mistral():
    return MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=8))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL))


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertModel(BertConfig(**sizes, num_attention_heads=4, vocab_size=90))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=90, decoder_start_token_id=0))


@cache
def made(make):
    """Return a model and its exact program; tests must not change them."""
    torch.manual_seed(0)
    model = make().eval()
    return model, attnopt.apply(attnopt.capture(model), "exact")


def lowered(make, backend="eager"):
    model, program = made(make)
    return model, attnopt.lower(program, backend)


def tokens(rows, length, seed=0):
    return torch.randint(2, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("make", [llama, mistral, gpt2, bert])
def test_it_computes_what_the_source_does(make, backend):
    model, twin = lowered(make, backend)
    for rows, length in ((1, 1), (2, 7), (3, 40)):
        ids = tokens(rows, length)
        for mask in (None, padded(ids)) if length > 4 else (None,):
            want, got = (m(input_ids=ids, attention_mask=mask) for m in (model, twin))
            assert type(got) is type(want)
            seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
            torch.testing.assert_close(got[0][seen], want[0][seen], rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_runs_its_first_and_its_later_steps():
    model, twin = lowered(t5)
    ids, start = tokens(2, 9), torch.zeros(2, 3, dtype=torch.long)
    want = model(input_ids=ids, decoder_input_ids=start)
    got = twin(input_ids=ids, decoder_input_ids=start)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    then = {"decoder_input_ids": tokens(2, 1), "attention_mask": torch.ones_like(ids)}
    results = []
    for m, first in ((model, want), (twin, got)):
        encoded = (first.encoder_last_hidden_state,)
        cache = first.past_key_values
        results.append(m(encoder_outputs=encoded, past_key_values=cache, **then).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, bert, t5])
def test_its_state_dict_is_the_sources(make):
    model, twin = lowered(make)
    want, got = model.state_dict(), twin.state_dict()
    assert set(got) == set(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    twin.load_state_dict({n: t + 1 for n, t in want.items()})
    assert all(torch.equal(model.state_dict()[name], want[name]) for name in want)


def test_tied_weights_stay_tied_and_are_its_own():
    model, twin = lowered(llama)
    weight = twin.get_parameter("model.embed_tokens.weight")
    assert twin.get_parameter("lm_head.weight") is weight
    assert weight is not model.lm_head.weight
    assert weight.data_ptr() != model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_moves_to_another_dtype_as_the_source_does(make):
    _, twin = lowered(make)
    torch.manual_seed(0)
    model = make().eval().to(torch.bfloat16)
    ids = tokens(2, 9)
    want, got = model(input_ids=ids).logits, twin.to(torch.bfloat16)(input_ids=ids).logits
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    back = twin.to(torch.float32)(input_ids=ids).logits
    assert back.dtype == torch.float32


def test_it_learns_as_the_source_does():
    model, twin = lowered(llama)
    ids = tokens(2, 11)
    gradients = []
    for m in (model, twin):
        m.zero_grad()
        m(input_ids=ids).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in m.named_parameters()})
        m.zero_grad()
    assert set(gradients[0]) == set(gradients[1])
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-4, atol=1e-7)


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "without a cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("make", [llama, mistral, gpt2])
def test_it_generates_the_same_tokens(make, way):
    model, twin = lowered(make)
    ids = tokens(3, 9)
    for mask in (torch.ones_like(ids), padded(ids)):
        results = []
        for m in (model, twin):
            torch.manual_seed(3)
            results.append(m.generate(ids, attention_mask=mask, max_new_tokens=10, **way))
        assert torch.equal(*results)


def bart():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 90}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    feed = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **feed))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("make", [t5, pytest.param(bart, marks=pytest.mark.slow)])
def test_an_encoder_decoder_generates_the_same_tokens(make, way):
    model, twin = lowered(make)
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    results = []
    for m in (model, twin):
        torch.manual_seed(3)
        results.append(m.generate(ids, attention_mask=mask, max_new_tokens=10, **way))
    assert torch.equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "prophetnet", "whisper"])
def test_a_cache_an_input_or_a_step_of_another_kind_generates_the_same_tokens(name):
    model, kwargs, _ = zoo.build(name, task="lm", pad="left")
    twin = attnopt.lower(attnopt.capture(model, (), kwargs), backend="eager")
    way = {"max_new_tokens": 24, "do_sample": False}
    # Whisper's own loop cuts speech into windows.
    want = GenerationMixin.generate(model, **kwargs, **way)
    assert torch.equal(twin.generate(**kwargs, **way), want)
    with pytest.raises(ValueError, match="not used by the model"):
        twin.generate(**kwargs, **way, inputs_features=1)


def test_tokens_stream_as_they_come():
    model, twin = lowered(llama)
    ids = tokens(1, 6)
    streams = []
    for m in (model, twin):
        stream = Collected()
        m.generate(ids, max_new_tokens=8, do_sample=False, streamer=stream)
        streams.append(stream.pieces)
    assert streams[0] == streams[1]
    assert len(streams[0]) == 1 + 8 + 1


class Collected(BaseStreamer):
    """Keeps every piece that generation puts, and its end."""

    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.pieces.append("end")


def test_an_assistant_drafts_what_a_lowered_model_checks():
    model, twin = lowered(llama)
    ids = tokens(1, 6)
    way = {"max_new_tokens": 12, "do_sample": False, "assistant_model": made(llama)[0]}
    assert torch.equal(twin.generate(ids, **way), model.generate(ids, **way))


def test_prompt_lookup_crops_its_cache():
    model, twin = lowered(llama)
    ids = tokens(1, 6).repeat(1, 3)
    way = {"do_sample": False, "max_new_tokens": 12, "prompt_lookup_num_tokens": 4}
    assert torch.equal(twin.generate(ids, **way), model.generate(ids, **way))


def test_a_cache_implementation_is_refused():
    with pytest.raises(ValueError, match="keeps its own state"):
        lowered(llama)[1].generate(tokens(1, 3), cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize("make", [llama, bert])
def test_it_does_not_save_itself_as_a_stock_checkpoint(make, tmp_path):
    with pytest.raises(TypeError, match="save the program it came from"):
        lowered(make)[1].save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_backend_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'eager'"):
        attnopt.lower(made(llama)[1], "eagre")


def test_no_mask_is_made_where_none_is_needed(monkeypatch):
    from attnopt.ops import sdpa

    asked = []
    kernel = sdpa.F.scaled_dot_product_attention

    def noting(*args, **kwargs):
        asked.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return kernel(*args, **kwargs)

    _, twin = lowered(llama)
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", noting)
    twin.generate(tokens(2, 9), max_new_tokens=3, do_sample=False)
    assert asked == [(True, True)] * 2 + [(True, False)] * 4


def test_layers_share_the_mask_that_they_need(monkeypatch):
    from attnopt.ops import sdpa

    masks = []
    kernel = sdpa.F.scaled_dot_product_attention

    def noting(*args, **kwargs):
        masks.append(kwargs["attn_mask"])
        return kernel(*args, **kwargs)

    _, twin = lowered(llama)
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", noting)
    ids = tokens(2, 9)
    twin(input_ids=ids, attention_mask=padded(ids))
    assert len(masks) == 2
    assert masks[0] is masks[1]


def test_a_module_without_attention_is_lowered_too():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5)).eval()
    program = attnopt.capture(module, (torch.randn(3, 4),))
    twin = attnopt.lower(program, "eager")
    x = torch.randn(5, 4)
    assert torch.equal(twin(x), module(x))


@pytest.mark.slow
def test_inductor_runs_every_length_with_few_graphs():
    """Compiling takes a minute."""
    from torch._dynamo.utils import counters

    model, twin = lowered(llama, "inductor")
    before = counters["stats"]["unique_graphs"]
    for length in (12, 17, 30, 9, 50):
        ids = tokens(2, length)
        want = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(twin.generate(ids, max_new_tokens=6, do_sample=False), want)
    assert counters["stats"]["unique_graphs"] - before <= 3
    mask = padded(ids)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    got = twin.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, want)
