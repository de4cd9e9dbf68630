"""The rows of the zoo: a config, its inputs and the number of attentions, all by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf

B, T, V, H, NH, KV, FF, L = 2, 16, 64, 32, 4, 2, 64, 2


@dataclass
class Entry:
    name: str
    family: str  # decoder encoder encdec vision audio multimodal timeseries hybrid control
    model_cls: str
    make_cfg: Callable[[], Any]
    inputs: Callable[[Any], dict]  # config -> kwargs
    sites: int  # logical softmax attentions per forward
    dyn: dict = field(default_factory=dict)  # input -> tuple of dynamic dims
    tags: tuple = ()  # spelling tags
    linear_sites: int = 0
    pieces: int | None = None  # softmax.V contractions seen in the data flow, if != sites
    note: str = ""
    ort_type: str = "bert"  # best guess for onnxruntime.transformers model_type


ZOO: dict[str, Entry] = {}


def _cfg(name, **kw):
    def f():
        return getattr(tf, name)(**kw)

    return f


# Inputs.
def _mask(t=T, pad=3):
    m = torch.ones(B, t, dtype=torch.long)
    m[1, t - pad :] = 0  # right padding: no fully masked row in a causal model
    return m


def ids(t=T, v=V, mask=True, lo=5, extra=None):
    def f(cfg):
        g = torch.Generator().manual_seed(0)
        d = {"input_ids": torch.randint(lo, v, (B, t), generator=g)}
        if mask:
            d["attention_mask"] = _mask(t)
        if extra:
            d.update(extra(g))
        return d

    return f


def encdec(t=T, u=12, v=V, lo=5):
    def f(cfg):
        g = torch.Generator().manual_seed(0)
        return {
            "input_ids": torch.randint(lo, v, (B, t), generator=g),
            "attention_mask": _mask(t),
            "decoder_input_ids": torch.randint(lo, v, (B, u), generator=g),
        }

    return f


def img(size=32, c=3, key="pixel_values", frames=None, extra=None):
    def f(cfg):
        g = torch.Generator().manual_seed(0)
        s = (B, c, size, size) if frames is None else (B, frames, c, size, size)
        d = {key: torch.randn(*s, generator=g)}
        if extra:
            d.update(extra(g))
        return d

    return f


def wave(n=1600):
    def f(cfg):
        g = torch.Generator().manual_seed(0)
        return {"input_values": torch.randn(B, n, generator=g)}

    return f


TXT = {"input_ids": (0, 1), "attention_mask": (0, 1)}
ED = {"input_ids": (0, 1), "attention_mask": (0, 1), "decoder_input_ids": (0, 1)}
IMG = {"pixel_values": (0,)}
WAV = {"input_values": (0, 1)}


def add(name, family, model_cls, cfg_cls, cfg, inputs, sites, dyn, tags=(), **kw):
    assert name not in ZOO, name
    ZOO[name] = Entry(
        name,
        family,
        model_cls,
        _cfg(cfg_cls, **cfg),
        inputs,
        sites,
        dyn,
        tuple(tags.split()) if isinstance(tags, str) else tuple(tags),
        **kw,
    )


# Decoders.
LL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": FF,
    "num_hidden_layers": L,
    "num_attention_heads": NH,
    "num_key_value_heads": KV,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
MHA = {**LL, "num_key_value_heads": NH}


def dec(name, prefix, cfg, tags, sites=L, cfgname=None, model=None, **kw):
    kw.setdefault("ort_type", "gpt2")
    inp = kw.pop("inputs", None) or ids()
    dyn = kw.pop("dyn", TXT)
    fam = kw.pop("family", "decoder")
    add(
        name,
        fam,
        model or prefix + "Model",
        cfgname or prefix + "Config",
        cfg,
        inp,
        sites,
        dyn,
        tags,
        **kw,
    )


G = "gqa_repeat_kv rope fp32_softmax causal_additive_mask"
dec("llama", "Llama", LL, G)
dec("llama_mha", "Llama", MHA, "mha rope fp32_softmax causal_additive_mask")
dec("mistral", "Mistral", {**LL, "sliding_window": 8}, G + " sliding_window")
dec("qwen2", "Qwen2", LL, G + " qkv_bias")
dec("qwen3", "Qwen3", {**LL, "head_dim": 16}, G + " qk_norm", ort_type="qwen3")
dec(
    "gemma",
    "Gemma",
    {**LL, "head_dim": 8, "num_key_value_heads": 1},
    "mqa rope fp32_softmax causal_additive_mask",
)
dec(
    "gemma2",
    "Gemma2",
    {
        **LL,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
    },
    G + " softcap sliding_window odd_scale",
)
dec(
    "gemma3",
    "Gemma3",
    {
        **LL,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    G + " qk_norm sliding_window odd_scale",
    cfgname="Gemma3TextConfig",
    model="Gemma3TextModel",
)
dec("phi", "Phi", MHA, "mha partial_rope fp32_softmax causal_additive_mask", ort_type="phi")
dec("phi3", "Phi3", {**LL}, G + " fused_qkv_linear", ort_type="phi")
GP = {
    "vocab_size": V,
    "n_embd": H,
    "n_layer": L,
    "n_head": NH,
    "n_positions": 128,
    "n_inner": FF,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
}
dec("gpt2", "GPT2", GP, "mha fused_qkv_conv1d causal_additive_mask")
dec(
    "gpt2_scale_by_layer",
    "GPT2",
    {**GP, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "mha fused_qkv_conv1d baddbmm scale_by_layer upcast",
)
dec(
    "openai_gpt",
    "OpenAIGPT",
    {"vocab_size": V, "n_embd": H, "n_layer": L, "n_head": NH, "n_positions": 128},
    "mha fused_qkv_conv1d mask_mul_add w*b+-1e4*(1-b)",
)
dec(
    "gpt_neo",
    "GPTNeo",
    {
        "vocab_size": V,
        "hidden_size": H,
        "num_layers": L,
        "num_heads": NH,
        "intermediate_size": FF,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 128,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mha no_scale causal_where local_window fp32_qk",
)
dec(
    "gpt_neox",
    "GPTNeoX",
    MHA,
    "mha partial_rope fused_qkv_linear causal_additive_mask",
    ort_type="gpt_neox",
)
dec("gpt_bigcode", "GPTBigCode", {**GP, "multi_query": True}, "mqa fused_qkv_linear")
dec(
    "opt",
    "OPT",
    {
        "vocab_size": V,
        "hidden_size": H,
        "ffn_dim": FF,
        "num_hidden_layers": L,
        "num_attention_heads": NH,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": H,
        "pad_token_id": 1,
        "use_cache": False,
    },
    "mha query_prescale causal_additive_mask",
)
dec(
    "bloom",
    "Bloom",
    {
        "vocab_size": V,
        "hidden_size": H,
        "n_layer": L,
        "n_head": NH,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    },
    "mha fused_qkv_linear baddbmm alibi bmm3d",
)
FA = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": NH,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    "ffn_hidden_size": FF,
}
dec("falcon_mq", "Falcon", {**FA, "multi_query": True, "alibi": False}, "mqa rope fused_qkv_linear")
dec(
    "falcon_new",
    "Falcon",
    {**FA, "new_decoder_architecture": True, "num_kv_heads": KV},
    "gqa rope fused_qkv_linear",
)
dec(
    "mpt",
    "Mpt",
    {
        "vocab_size": V,
        "d_model": H,
        "n_layers": L,
        "n_heads": NH,
        "expansion_ratio": 2,
        "max_seq_len": 128,
        "use_cache": False,
    },
    "mha alibi fused_qkv_linear masked_fill fp32_softmax",
)
dec("starcoder2", "Starcoder2", {**LL, "sliding_window": 8}, G + " sliding_window qkv_bias")
dec("olmo", "Olmo", {**LL, "clip_qkv": 8.0}, G + " clip_qkv")
dec("cohere2", "Cohere2", {**LL, "sliding_window": 8}, G + " sliding_window nope rope_interleaved")
dec("granite", "Granite", {**LL, "attention_multiplier": 0.5}, G + " odd_scale")
dec("glm", "Glm", {**LL, "head_dim": 8}, G + " partial_rope_interleaved")
MLA = {
    **LL,
    "num_key_value_heads": NH,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
dec(
    "deepseek_v2",
    "DeepseekV2",
    {**MLA, "topk_method": "greedy"},
    "mla rope_complex dv!=dk fp32_softmax causal_additive_mask moe_router",
)
dec(
    "deepseek_v3",
    "DeepseekV3",
    MLA,
    "mla rope_interleaved dv!=dk fp32_softmax causal_additive_mask moe_router",
)
dec(
    "minicpm3",
    "MiniCPM3",
    {
        **LL,
        "num_key_value_heads": NH,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "mla dv!=dk",
)
dec(
    "mixtral",
    "Mixtral",
    {**LL, "num_local_experts": 4, "num_experts_per_tok": 2},
    G + " moe_router",
)
dec(
    "qwen2_moe",
    "Qwen2Moe",
    {
        **LL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    G + " moe_router",
)
dec(
    "dbrx",
    "Dbrx",
    {
        "vocab_size": V,
        "d_model": H,
        "n_layers": L,
        "n_heads": NH,
        "max_seq_len": 128,
        "use_cache": False,
        "attn_config": {"kv_n_heads": KV, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": FF,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": H,
        },
    },
    "gqa_repeat_kv rope clip_qkv fused_qkv_linear moe_router",
)
dec(
    "biogpt",
    "BioGpt",
    {
        "vocab_size": V,
        "hidden_size": H,
        "num_hidden_layers": L,
        "num_attention_heads": NH,
        "intermediate_size": FF,
        "max_position_embeddings": 128,
        "use_cache": False,
    },
    "mha bart_style",
)
dec(
    "xglm",
    "XGLM",
    {
        "vocab_size": V,
        "d_model": H,
        "ffn_dim": FF,
        "num_layers": L,
        "attention_heads": NH,
        "max_position_embeddings": 128,
        "use_cache": False,
    },
    "mha bart_bmm3d query_prescale max_finfo_clamp",
)
dec(
    "ctrl",
    "CTRL",
    {
        "vocab_size": V,
        "n_embd": H,
        "n_layer": L,
        "n_head": NH,
        "dff": FF,
        "n_positions": 128,
        "use_cache": False,
    },
    "mha div_sqrt mask_times_-1e4 double_mask",
)
dec("smollm3", "SmolLM3", {**LL, "no_rope_layers": [1, 0]}, G + " nope")
dec(
    "gpt_oss",
    "GptOss",
    {**LL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gqa_repeat_kv rope sinks_concat max_subtract sliding_window moe_router",
)
dec(
    "llama4_text",
    "Llama4Text",
    {
        **LL,
        "intermediate_size_mlp": FF,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0],
    },
    "gqa_repeat_kv rope_complex chunked_mask qk_norm temperature_tuning moe_router",
    cfgname="Llama4TextConfig",
)
dec(
    "diffllama",
    "DiffLlama",
    LL,
    "differential_attention two_softmax_difference gqa_repeat_kv",
    sites=2 * L,
    note="(softmax1 - lambda*softmax2).V spelled as two attention calls per layer",
)
dec(
    "exaone4",
    "Exaone4",
    {
        **LL,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    G + " qk_norm sliding_window nope",
)
dec("ernie4_5", "Ernie4_5", {**LL, "head_dim": 8}, G + " rope_interleaved")
dec("nanochat", "NanoChat", LL, G + " qk_norm softcap_logits")
dec("doge", "Doge", {**LL, "head_dim": 8}, G + " dynamic_mask_from_values")
dec("apertus", "Apertus", LL, G + " qk_norm")
dec(
    "xlnet",
    "XLNet",
    {"vocab_size": V, "d_model": H, "n_layer": L, "n_head": NH, "d_inner": FF},
    "einsum rel_shift xlnet_score_sum seq_first",
    family="encoder",
    inputs=ids(),
)
dec(
    "xlm",
    "XLM",
    {"vocab_size": V, "emb_dim": H, "n_layers": L, "n_heads": NH, "max_position_embeddings": 128},
    "mha masked_fill query_prescale",
    family="encoder",
    inputs=ids(),
)
dec(
    "reformer",
    "Reformer",
    {
        "vocab_size": V,
        "hidden_size": H,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": FF,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hashes": 1,
        "num_buckets": 2,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 16],
        "max_position_embeddings": 16,
        "is_decoder": False,
        "hash_seed": 0,
    },
    "lsh local_chunked logsumexp_exp",
    inputs=ids(16),
    pieces=0,
    note="both local and LSH spell softmax as exp(x - logsumexp(x)); no aten softmax at all",
)

# hybrids: some layers attention, some recurrent / linear
dec(
    "minimax",
    "MiniMax",
    {
        **LL,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    G + " lightning_linear_attention moe_router",
    sites=1,
    linear_sites=1,
    family="hybrid",
)
dec(
    "jamba",
    "Jamba",
    {
        **LL,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "gqa_repeat_kv nope mamba_hybrid moe_router",
    sites=1,
    linear_sites=1,
    family="hybrid",
)
dec(
    "recurrent_gemma",
    "RecurrentGemma",
    {
        **LL,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": H,
        "attention_window_size": 8,
    },
    "mqa partial_rope local_window rglru_hybrid",
    sites=1,
    linear_sites=2,
    family="hybrid",
)
dec(
    "qwen3_next",
    "Qwen3Next",
    {
        **LL,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    G + " gated_output delta_rule_hybrid qk_norm moe_router",
    sites=1,
    linear_sites=1,
    family="hybrid",
)
dec(
    "bamba",
    "Bamba",
    {
        **LL,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "mamba_expand": 2,
    },
    G + " mamba2_hybrid",
    sites=1,
    linear_sites=1,
    family="hybrid",
)

# Encoders.
BB = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": FF,
    "num_hidden_layers": L,
    "num_attention_heads": NH,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def enc(name, prefix, cfg, tags, sites=L, **kw):
    cfgname = kw.pop("cfgname", prefix + "Config")
    model = kw.pop("model", prefix + "Model")
    add(
        name,
        kw.pop("family", "encoder"),
        model,
        cfgname,
        cfg,
        kw.pop("inputs", ids()),
        sites,
        kw.pop("dyn", TXT),
        tags,
        **kw,
    )


enc("bert", "Bert", BB, "mha additive_mask")
enc("bert_nomask", "Bert", BB, "mha no_mask", inputs=ids(mask=False), dyn={"input_ids": (0, 1)})
enc("roberta", "Roberta", BB, "mha additive_mask")
enc("xlm_roberta", "XLMRoberta", BB, "mha additive_mask")
enc(
    "distilbert",
    "DistilBert",
    {
        "vocab_size": V,
        "dim": H,
        "hidden_dim": FF,
        "n_layers": L,
        "n_heads": NH,
        "max_position_embeddings": 128,
    },
    "mha additive_mask",
)
enc("albert", "Albert", {**BB, "embedding_size": 16}, "mha additive_mask shared_weights")
enc("electra", "Electra", {**BB, "embedding_size": 16}, "mha additive_mask")
enc(
    "deberta",
    "Deberta",
    {
        **BB,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": 32,
    },
    "disentangled gather_bias xsoftmax_masked_fill fused_in_proj",
)
enc("mpnet", "MPNet", BB, "mha additive_mask t5_bias")
enc(
    "modernbert",
    "ModernBert",
    {
        **BB,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 3,
        "sep_token_id": 4,
    },
    "mha rope fused_qkv_linear sliding_window_bidirectional",
)
enc("roformer", "RoFormer", {**BB, "embedding_size": H}, "mha rope_interleaved additive_mask")
enc("nomic_bert", "NomicBert", {**BB}, "mha rope")
enc(
    "longformer",
    "Longformer",
    {**BB, "attention_window": 8},
    "sliding_chunks einsum as_strided diagonal masked_fill",
    note="local window attention built from overlapping chunks",
)
enc(
    "longformer_global",
    "Longformer",
    {**BB, "attention_window": 8},
    "sliding_chunks einsum as_strided global_tokens cat_scores nonzero_data_dependent",
    sites=2 * L,
    inputs=ids(
        extra=lambda g: {
            "global_attention_mask": torch.cat([torch.ones(B, 1), torch.zeros(B, T - 1)], 1).long()
        }
    ),
    dyn={**TXT, "global_attention_mask": (0, 1)},
    note="local+global-key softmax and separate global-query softmax",
)
enc("big_bird_full", "BigBird", {**BB, "attention_type": "original_full"}, "mha additive_mask")
enc(
    "big_bird_sparse",
    "BigBird",
    {**BB, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    "block_sparse einsum random_blocks multiple_softmax",
    inputs=ids(64),
    pieces=5 * L,
    note="5 softmaxes (first to last block) form one logical attention per layer",
)
enc(
    "funnel",
    "Funnel",
    {
        "vocab_size": V,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "d_model": H,
        "n_head": NH,
        "d_head": 8,
        "d_inner": FF,
    },
    "einsum rel_shift pooled_query additive_terms",
    sites=3,
)
enc(
    "mobilebert",
    "MobileBert",
    {
        **BB,
        "embedding_size": H,
        "true_hidden_size": 16,
        "intra_bottleneck_size": 16,
        "hidden_size": H,
    },
    "mha additive_mask bottleneck",
)
enc("megatron_bert", "MegatronBert", BB, "mha additive_mask div_sqrt")
enc(
    "canine",
    "Canine",
    {
        **BB,
        "local_transformer_stride": 8,
        "downsampling_rate": 4,
        "num_hash_functions": 2,
        "num_hash_buckets": 16,
    },
    "mha local_chunks cat",
    sites=L + 2 + 1,
    inputs=ids(16),
    note="initial local encoder = 16/8 = 2 chunked attention calls, final shallow encoder 1",
)
enc("ibert", "IBert", {**BB, "quant_mode": False}, "mha additive_mask quant_wrapped")
enc(
    "nystromformer",
    "Nystromformer",
    {**BB, "num_landmarks": 4, "segment_means_seq_len": 16, "conv_kernel_size": 3},
    "nystrom three_softmax iterative_inverse",
    pieces=3 * L,
    inputs=ids(mask=False),
    dyn={"input_ids": (0, 1)},
    note="3 softmaxes form one logical (approximate) attention per layer",
)
enc(
    "perceiver",
    "Perceiver",
    {
        "num_latents": 8,
        "d_latents": H,
        "d_model": H,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
    },
    "cross_latent mha inverted_mask",
    sites=3,
    inputs=lambda cfg: {"inputs": torch.randn(B, T, H, generator=torch.Generator().manual_seed(0))},
    dyn={"inputs": (0, 1)},
)

# Encoder-decoder.
T5 = {
    "vocab_size": V,
    "d_model": H,
    "d_kv": 8,
    "d_ff": FF,
    "num_layers": L,
    "num_heads": NH,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_cache": False,
}
BA = {
    "vocab_size": V,
    "d_model": H,
    "encoder_layers": L,
    "decoder_layers": L,
    "encoder_attention_heads": NH,
    "decoder_attention_heads": NH,
    "encoder_ffn_dim": FF,
    "decoder_ffn_dim": FF,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "use_cache": False,
}


def ed(name, prefix, cfg, tags, sites=3 * L, **kw):
    kw.setdefault("ort_type", "bart")
    cfgname = kw.pop("cfgname", prefix + "Config")
    model = kw.pop("model", prefix + "Model")
    add(
        name,
        "encdec",
        model,
        cfgname,
        cfg,
        kw.pop("inputs", encdec()),
        sites,
        kw.pop("dyn", ED),
        tags,
        **kw,
    )


ed("t5", "T5", T5, "t5_bias no_scale cross_attention", ort_type="t5")
ed("mt5", "MT5", T5, "t5_bias no_scale cross_attention", ort_type="t5")
ed(
    "longt5_local",
    "LongT5",
    {**T5, "local_radius": 3, "encoder_attention_type": "local"},
    "t5_bias block_local einsum cross_attention",
    ort_type="t5",
)
ed(
    "switch_transformers",
    "SwitchTransformers",
    {
        **T5,
        "num_experts": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "t5_bias no_scale moe_router",
    ort_type="t5",
)
ed("bart", "Bart", BA, "mha bart_style cross_attention")
ed("mbart", "MBart", BA, "mha bart_style cross_attention")
ed("marian", "Marian", {**BA, "decoder_vocab_size": V}, "mha bart_style cross_attention")
ed(
    "led",
    "LED",
    {
        **BA,
        "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 128,
        "attention_window": 8,
    },
    "sliding_chunks einsum bart_bmm3d cross_attention",
)
ed(
    "bigbird_pegasus",
    "BigBirdPegasus",
    {**BA, "attention_type": "original_full"},
    "mha bart_style cross_attention",
)
ed(
    "prophetnet",
    "ProphetNet",
    {
        "vocab_size": V,
        "hidden_size": H,
        "encoder_ffn_dim": FF,
        "decoder_ffn_dim": FF,
        "num_encoder_layers": L,
        "num_decoder_layers": L,
        "num_encoder_attention_heads": NH,
        "num_decoder_attention_heads": NH,
        "max_position_embeddings": 128,
        "ngram": 2,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
    "ngram_streams einsum rel_bias_gather cross_attention",
    sites=L + L * 2 + L,
    note="per decoder layer: main stream softmax + predict-stream softmax (einsum) + cross",
)


def audio_feats(cfg):
    g = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(B, 16, 64, generator=g),
        "decoder_input_ids": torch.randint(5, V, (B, 12), generator=g),
    }


ed(
    "whisper",
    "Whisper",
    {**BA, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64},
    "mha bart_style cross_attention query_prescale",
    inputs=audio_feats,
    dyn={"input_features": (0,), "decoder_input_ids": (0, 1)},
)


def s2t_feats(cfg):
    g = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(B, 64, 16, generator=g),
        "decoder_input_ids": torch.randint(5, V, (B, 12), generator=g),
    }


# Vision.
VI = {
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": NH,
    "intermediate_size": FF,
    "image_size": 32,
    "patch_size": 8,
}


def vis(name, prefix, cfg, tags, sites=L, **kw):
    kw.setdefault("ort_type", "vit")
    cfgname = kw.pop("cfgname", prefix + "Config")
    model = kw.pop("model", prefix + "Model")
    add(
        name,
        kw.pop("family", "vision"),
        model,
        cfgname,
        cfg,
        kw.pop("inputs", img()),
        sites,
        kw.pop("dyn", IMG),
        tags,
        **kw,
    )


vis("vit", "ViT", VI, "mha no_mask")
vis("deit", "DeiT", VI, "mha no_mask")
vis(
    "beit",
    "Beit",
    {**VI, "use_relative_position_bias": True, "use_shared_relative_position_bias": False},
    "mha rel_bias_table",
)
vis(
    "data2vec_vision",
    "Data2VecVision",
    {**VI, "use_shared_relative_position_bias": True},
    "mha rel_bias_table",
)
SW = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
vis("swin", "Swin", SW, "window_partition rel_bias_table shifted_mask", ort_type="swin")
vis(
    "swinv2",
    "Swinv2",
    {**SW, "depths": [2, 1]},
    "window_partition cosine_attention normalize exp_logit_scale cpb_mlp_bias",
    sites=3,
    ort_type="swin",
)
vis("dinov2", "Dinov2", {**VI, "mlp_ratio": 2}, "mha no_mask layerscale")
vis("dinov2_with_registers", "Dinov2WithRegisters", {**VI, "mlp_ratio": 2}, "mha no_mask")
vis("clip_vision", "CLIPVision", VI, "mha query_scale no_mask", ort_type="clip")
vis(
    "clip_text",
    "CLIPText",
    {**BB, "projection_dim": H, "eos_token_id": 2, "bos_token_id": 1},
    "mha causal_additive_mask",
    inputs=ids(),
    dyn=TXT,
    ort_type="clip",
    family="multimodal",
)
vis(
    "siglip_vision",
    "SiglipVision",
    VI,
    "mha no_mask attention_pooling(nn.MultiheadAttention)",
    sites=L + 1,
    note="pooling head is torch.nn.MultiheadAttention",
)
vis("blip_vision", "BlipVision", VI, "mha fused_qkv_linear permute_5d", family="multimodal")
vis(
    "detr",
    "Detr",
    {
        "d_model": H,
        "encoder_layers": L,
        "decoder_layers": L,
        "encoder_attention_heads": NH,
        "decoder_attention_heads": NH,
        "encoder_ffn_dim": FF,
        "decoder_ffn_dim": FF,
        "num_queries": 8,
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_channels": 3,
            "out_features": ["stage4"],
        },
    },
    "mha cross_attention object_queries",
    sites=3 * L,
    inputs=img(64),
)
vis(
    "segformer",
    "Segformer",
    {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
    },
    "spatial_reduction_conv kv_downsample",
)
vis(
    "pvt",
    "Pvt",
    {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
    },
    "spatial_reduction_conv kv_downsample",
)
vis(
    "vit_mae",
    "ViTMAE",
    VI,
    "mha no_mask random_masking_gather",
    inputs=img(extra=lambda g: {"noise": torch.rand(B, 16, generator=g)}),
    dyn={"pixel_values": (0,), "noise": (0,)},
)
vis("ijepa", "IJepa", VI, "mha no_mask")
vis(
    "sam_vision",
    "SamVision",
    {
        **VI,
        "window_size": 2,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "num_pos_feats": 8,
        "mlp_dim": FF,
    },
    "window_partition decomposed_rel_pos einsum bmm3d",
)
vis(
    "videomae",
    "VideoMAE",
    {**VI, "num_frames": 4, "tubelet_size": 2},
    "mha no_mask",
    inputs=img(frames=4),
)
vis(
    "timesformer",
    "Timesformer",
    {**VI, "num_frames": 4},
    "mha fused_qkv_linear divided_space_time",
    sites=2 * L,
    inputs=img(frames=4),
)
vis(
    "mobilevit",
    "MobileViT",
    {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "num_attention_heads": 4,
        "patch_size": 2,
        "mlp_ratio": 2.0,
    },
    "mha unfold_patches",
    sites=9,
    inputs=img(64),
    note="fixed 2+4+3 transformer layers",
)
vis(
    "mobilevitv2",
    "MobileViTV2",
    {
        "image_size": 64,
        "base_attn_unit_dims": [16, 16, 16],
        "n_attn_blocks": [1, 1, 1],
        "width_multiplier": 0.25,
        "patch_size": 2,
    },
    "linear_self_attention softmax_times_broadcast_sum",
    sites=0,
    linear_sites=3,
    inputs=img(64),
    family="control",
    note="separable (linear) attention: softmax over tokens but no QK product",
)
vis(
    "vitdet",
    "VitDet",
    {
        **VI,
        "use_relative_position_embeddings": True,
        "window_block_indices": [0],
        "window_size": 2,
        "pretrain_image_size": 32,
        "use_absolute_position_embeddings": True,
    },
    "window_partition decomposed_rel_pos einsum",
)
vis(
    "trocr_decoder",
    "TrOCR",
    {
        "vocab_size": V,
        "d_model": H,
        "decoder_layers": L,
        "decoder_attention_heads": NH,
        "decoder_ffn_dim": FF,
        "max_position_embeddings": 128,
        "use_cache": False,
        "cross_attention_hidden_size": H,
    },
    "mha bart_bmm3d",
    inputs=ids(),
    dyn=TXT,
    model="TrOCRForCausalLM",
    family="decoder",
    ort_type="bart",
)
vis("flava_image", "FlavaImage", VI, "mha no_mask")
vis(
    "bridgetower_like_clip",
    "CLIP",
    {
        "text_config": {**BB, "eos_token_id": 2, "bos_token_id": 1},
        "vision_config": dict(VI),
        "projection_dim": H,
    },
    "mha causal_additive_mask no_mask",
    sites=2 * L,
    family="multimodal",
    ort_type="clip",
    inputs=lambda cfg: {**ids()(cfg), **img()(cfg)},
    dyn={**TXT, "pixel_values": (0,)},
)

# Audio / time series.
W2 = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": NH,
    "intermediate_size": FF,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
    "layerdrop": 0.0,
}


def aud(name, prefix, cfg, tags, sites=L, **kw):
    model = kw.pop("model", prefix + "Model")
    add(
        name,
        kw.pop("family", "audio"),
        model,
        kw.pop("cfgname", prefix + "Config"),
        cfg,
        kw.pop("inputs", wave()),
        sites,
        kw.pop("dyn", WAV),
        tags,
        **kw,
    )


aud("wav2vec2", "Wav2Vec2", W2, "mha bart_style no_mask", ort_type="bart")
aud("hubert", "Hubert", W2, "mha bart_style no_mask", ort_type="bart")
aud(
    "sew_d",
    "SEWD",
    {
        **W2,
        "squeeze_factor": 2,
        "pos_att_type": ("p2c", "c2p"),
        "position_buckets": 8,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "disentangled gather_bias bmm3d masked_fill",
)
aud(
    "audio_spectrogram_transformer",
    "AST",
    {k: v for k, v in VI.items() if k != "image_size"}
    | {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    "mha no_mask",
    inputs=lambda cfg: {
        "input_values": torch.randn(B, 32, 16, generator=torch.Generator().manual_seed(0))
    },
    dyn={"input_values": (0,)},
    ort_type="vit",
)
aud(
    "patchtst",
    "PatchTST",
    {
        "num_input_channels": 2,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": H,
        "num_hidden_layers": L,
        "num_attention_heads": NH,
        "ffn_dim": FF,
    },
    "mha bart_style channel_batch",
    inputs=lambda cfg: {
        "past_values": torch.randn(B, 32, 2, generator=torch.Generator().manual_seed(0))
    },
    dyn={"past_values": (0,)},
    family="timeseries",
    ort_type="bart",
)

# Negative controls.
RN = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
vis("resnet", "ResNet", RN, "", sites=0, family="control")
vis(
    "convnext",
    "ConvNext",
    {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "drop_path_rate": 0.0},
    "",
    sites=0,
    family="control",
)
vis(
    "poolformer",
    "PoolFormer",
    {
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
        "mlp_ratio": 2.0,
    },
    "",
    sites=0,
    family="control",
)
vis(
    "efficientnet",
    "EfficientNet",
    {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "",
    sites=0,
    family="control",
)
enc(
    "mamba",
    "Mamba",
    {
        "vocab_size": V,
        "hidden_size": H,
        "num_hidden_layers": L,
        "state_size": 8,
        "use_cache": False,
    },
    "selective_scan",
    sites=0,
    linear_sites=L,
    family="control",
    inputs=ids(mask=False),
    dyn={"input_ids": (0, 1)},
)
enc(
    "rwkv",
    "Rwkv",
    {
        "vocab_size": V,
        "hidden_size": H,
        "num_hidden_layers": L,
        "attention_hidden_size": H,
        "intermediate_size": FF,
        "context_length": 64,
        "use_cache": False,
    },
    "wkv_recurrence",
    sites=0,
    linear_sites=L,
    family="control",
    inputs=ids(mask=False),
    dyn={"input_ids": (0, 1)},
)
enc(
    "fnet",
    "FNet",
    {k: v for k, v in BB.items() if k != "num_attention_heads"},
    "fft_mixing",
    sites=0,
    family="control",
    inputs=ids(mask=False),
    dyn={"input_ids": (0, 1)},
)
