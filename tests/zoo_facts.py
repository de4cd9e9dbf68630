"""What every site of the zoo must say, from the model's config and the semantics of its class.

`expected(name, config, kwargs, task)` lists the sites in order of execution. A fact that an
architecture does not settle with one value stays `ANY`, and the row says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import zoo
from site_facts import ANY, Expected
from zoo_table import ZOO

from attnopt.nouns import Mask

NONE: Final = Mask("none")
CAUSAL: Final = Mask("causal")
Facts = tuple[Expected, ...]
Rule = Callable[[Any], Facts]


def expected(
    name: str, config: Any, kwargs: Mapping[str, Any] | None = None, task: str = "base"
) -> Facts:
    """Return the facts of an entry's sites, in order of execution."""
    entry = ZOO[name]
    config = getattr(config, "text_config", None) or config if name in TEXT_PART else config
    facts = RULES.get(name, FAMILIES.get(entry.family, encoder))(config)
    padded = kwargs is not None and "attention_mask" in kwargs
    lm = task == "lm" and entry.family not in ("encoder", "vision")
    facts = tuple(_with_call(name, one, padded=padded, lm=lm) for one in facts)
    return facts[: entry.sites] if name in ("minimax",) else facts


def _with_call(name: str, facts: Expected, *, padded: bool, lm: bool) -> Expected:
    """Add what depends on the call: padding, and the cache of the decoder's self-attention."""
    own_causal = facts.kind == "self" and facts.mask not in (NONE, ANY)
    cached = (True if own_causal else ANY) if lm and zoo.keeps_cache(name) else False
    if ZOO[name].family in ("decoder", "encoder", "hybrid") and facts.padded is ANY:
        facts = replace(facts, padded=padded if name not in MASKLESS else ANY)
    return facts if facts.cached is not ANY else replace(facts, cached=cached)


def site(config: Any, **known: Any) -> Expected:
    """Return the facts that nearly every config states in the same words."""
    heads = known.pop("heads", None) or config.num_attention_heads
    size = known.pop("head_dim", None) or getattr(config, "head_dim", None)
    size = size or config.hidden_size // heads
    values = {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": size,
        "v_head_dim": size,
        "scale": size**-0.5,
        "mask": NONE,
        "kind": "self",
        "softcap": None,
        "sinks": False,
    }
    return Expected(**{**values, **known})


def layers(config: Any) -> int:
    return config.num_hidden_layers


def encoder(config: Any, **known: Any) -> Facts:
    """Every token sees every token."""
    return (site(config, **known),) * layers(config)


def decoder(config: Any, **known: Any) -> Facts:
    """Causal layers, windowed or chunked where the config says so."""
    return tuple(site(config, mask=mask, **known) for mask in decoder_masks(config))


def decoder_masks(config: Any) -> list[Mask]:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return [Mask("sliding", window=window) if window else CAUSAL] * layers(config)
    masks = {
        "full_attention": CAUSAL,
        "sliding_attention": Mask("sliding", window=window),
        "chunked_attention": Mask("chunked", window=getattr(config, "attention_chunk_size", None)),
    }
    return [masks[kind] for kind in kinds if kind in masks]


def encoder_decoder(config: Any, **known: Any) -> Facts:
    """The encoder's layers, then self and cross attention for each of the decoder's."""
    heads = config.decoder_attention_heads
    size = {"heads": config.encoder_attention_heads, **known}
    own = site(config, **size, padded=ANY, cached=False)
    turn = {**known, "heads": heads}
    first = site(config, **turn, mask=CAUSAL)
    cross = site(config, **turn, kind="cross")
    return (own,) * config.encoder_layers + (first, cross) * config.decoder_layers


def t5(config: Any) -> Facts:
    """No scale, a bias from buckets of distances in self-attention."""
    known = {"heads": config.num_heads, "head_dim": config.d_kv, "scale": 1.0}
    bias = ("relative", "table")
    own = site(config, **known, bias=bias, cached=False)
    if getattr(config, "encoder_attention_type", "") == "local":
        radius = config.local_radius
        own = replace(own, mask=Mask("sliding", window=radius, right=radius))
    first = site(config, **known, bias=bias, mask=CAUSAL)
    cross = site(config, **known, kind="cross")
    return (own,) * config.num_layers + (first, cross) * config.num_decoder_layers


def prophetnet(config: Any) -> Facts:
    """The main stream is causal; no mask has the name of what the predicting stream sees."""
    own = site(config, heads=config.num_encoder_attention_heads, cached=False)
    known = {"heads": config.num_decoder_attention_heads}
    main = site(config, **known, mask=CAUSAL)
    ahead = site(config, **known, mask=ANY, kind=ANY)
    cross = site(config, **known, kind="cross")
    turn = (main, ahead, cross)
    return (own,) * config.num_encoder_layers + turn * config.num_decoder_layers


def latent(config: Any) -> Facts:
    """Multi-head latent attention: keys have a rotated part that all heads share."""
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    return decoder(config, head_dim=size, v_head_dim=config.v_head_dim)


def gpt_neo(config: Any) -> Facts:
    """No scale; local layers see `window_size` keys, their own included."""
    masks = {"global": CAUSAL, "local": Mask("sliding", window=config.window_size)}
    return tuple(site(config, mask=masks[kind], scale=1.0) for kind in config.attention_layers)


def scaled_by_layer(config: Any) -> Facts:
    return tuple(replace(one, scale=one.scale / (i + 1)) for i, one in enumerate(decoder(config)))


def query_scalar(config: Any) -> Facts:
    """Gemma 2 and 3: the scale comes from a config value of its own."""
    cap = getattr(config, "attn_logit_softcapping", None)
    return decoder(config, scale=config.query_pre_attn_scalar**-0.5, softcap=cap)


def llama4(config: Any) -> Facts:
    """Layers without rotary embedding scale queries by a function of the position."""
    facts = decoder(config)
    plain = config.no_rope_layers
    return tuple(
        one if rotates else replace(one, scale=ANY)
        for one, rotates in zip(facts, plain, strict=True)
    )


def diffllama(config: Any) -> Facts:
    """Two attentions a layer with the same weights, each over half of the value heads."""
    return tuple(replace(one, kv_heads=ANY) for one in decoder(config) for _ in range(2))


def one_attention_layer(config: Any) -> Facts:
    """Hybrids with one attention among recurrent or linear layers."""
    return (site(config, mask=CAUSAL),)


def recurrent_gemma(config: Any) -> Facts:
    return (site(config, mask=Mask("sliding", window=config.attention_window_size)),)


def modernbert(config: Any) -> Facts:
    """Local layers see half of `local_attention` to each side."""
    half = config.local_attention // 2
    masks = {"full_attention": NONE, "sliding_attention": Mask("sliding", window=half, right=half)}
    return tuple(site(config, mask=masks[kind]) for kind in config.layer_types)


def longformer(config: Any) -> Facts:
    """Half of `attention_window` to each side."""
    windows = config.attention_window
    windows = [windows] * layers(config) if isinstance(windows, int) else windows
    masks = [Mask("sliding", window=w // 2, right=w // 2) for w in windows]
    return tuple(site(config, mask=mask) for mask in masks)


def longformer_global(config: Any) -> Facts:
    """Local keys beside global ones, and queries of global tokens: no mask has that name."""
    return tuple(site(config, mask=ANY, padded=ANY, kind=ANY) for _ in range(2 * layers(config)))


def led(config: Any) -> Facts:
    windows = config.attention_window
    windows = [windows] * config.encoder_layers if isinstance(windows, int) else windows
    facts = encoder_decoder(config)
    masks = [Mask("sliding", window=w // 2, right=w // 2) for w in windows]
    own = tuple(replace(facts[0], mask=mask) for mask in masks)
    return own + facts[config.encoder_layers :]


def disentangled(config: Any) -> Facts:
    """DeBERTa: one factor for content and each direction of position."""
    directions = 1 + len(config.pos_att_type)
    size = config.hidden_size // config.num_attention_heads
    return encoder(config, scale=(size * directions) ** -0.5)


def funnel(config: Any) -> Facts:
    """Pooled queries read unpooled keys at each block's start; a bias of relative positions."""
    known = {"heads": config.n_head, "head_dim": config.d_head}
    count = sum(config.block_sizes) + config.num_decoder_layers
    return (site(config, **known, kind=ANY, padded=ANY),) * count


def mobilebert(config: Any) -> Facts:
    return encoder(config, head_dim=config.true_hidden_size // config.num_attention_heads)


def canine(config: Any) -> Facts:
    """One local attention per stride of characters, the deep encoder, the final layer."""
    chunk = site(config, mask=ANY, kind=ANY, padded=ANY)
    local = (chunk,) * (16 // config.local_transformer_stride)
    return local + (site(config, padded=ANY),) * layers(config) + (chunk,)


def reformer(config: Any) -> Facts:
    """Hashed and chunked keys; LSH normalises shared keys."""
    known = {"heads": 2, "head_dim": config.attention_head_size}
    return (site(config, **known, mask=ANY, scale=ANY, kind=ANY, padded=ANY),) * 2


def approximate(config: Any) -> Facts:
    """Landmarks or random blocks: no mask has that name."""
    return encoder(config, mask=ANY, scale=ANY, kind=ANY, padded=ANY)


def perceiver(config: Any) -> Facts:
    """Latents read the input, then themselves."""
    cross = site(config, heads=config.num_cross_attention_heads, head_dim=config.d_model)
    own = site(
        config,
        heads=config.num_self_attention_heads,
        head_dim=config.d_latents // config.num_self_attention_heads,
    )
    return (replace(cross, kind="cross"),) + (own,) * config.num_self_attends_per_block


def detr(config: Any) -> Facts:
    """Object queries are not causal."""
    return tuple(
        replace(one, mask=NONE, padded=ANY, cached=False) for one in encoder_decoder(config)
    )


def staged(config: Any) -> Facts:
    """Vision models whose stages differ in width and heads."""
    rows = zip(config.hidden_sizes, config.num_attention_heads, strict=True)
    return tuple(site(config, heads=heads, head_dim=width // heads) for width, heads in rows)


def swin(config: Any) -> Facts:
    """Windows are a batch axis; a table biases the scores."""
    rows = [(config.embed_dim * 2**i, n) for i, n in enumerate(config.num_heads)]
    return tuple(
        site(config, heads=heads, head_dim=width // heads, bias=("relative", "table"))
        for (width, heads), depth in zip(rows, config.depths, strict=True)
        for _ in range(depth)
    )


def swinv2(config: Any) -> Facts:
    """Cosine attention with a learned scale per head; every second block is shifted."""
    facts = tuple(replace(one, scale=ANY, bias=ANY) for one in swin(config))
    return tuple(replace(one, mask=ANY if i % 2 else NONE) for i, one in enumerate(facts))


def siglip(config: Any) -> Facts:
    """The pooling head's query is a parameter."""
    return (*encoder(config), site(config, kind="cross"))


def timesformer(config: Any) -> Facts:
    """Time, then space, in every layer."""
    return encoder(config) * 2


def mobilevit(config: Any) -> Facts:
    """Fixed numbers of transformer layers in the last three stages."""
    heads = config.num_attention_heads
    widths = [w for w, n in zip(config.hidden_sizes, (2, 4, 3), strict=True) for _ in range(n)]
    return tuple(site(config, head_dim=width // heads) for width in widths)


def clip(config: Any) -> Facts:
    """The image first, then the text."""
    return encoder(config.vision_config) + decoder(config.text_config)


FAMILIES: Final[dict[str, Rule]] = {
    "decoder": decoder,
    "encdec": encoder_decoder,
    "hybrid": one_attention_layer,
    "control": lambda config: (),
}

RULES: Final[dict[str, Rule]] = {
    "audio_spectrogram_transformer": encoder,
    "big_bird_sparse": approximate,
    "bloom": lambda c: decoder(c, bias="alibi"),
    "bridgetower_like_clip": clip,
    "canine": canine,
    "clip_text": decoder,
    "dbrx": lambda c: decoder(
        c, heads=c.n_heads, head_dim=c.d_model // c.n_heads, kv_heads=c.attn_config.kv_n_heads
    ),
    "deberta": disentangled,
    "deepseek_v2": latent,
    "deepseek_v3": latent,
    "detr": detr,
    "diffllama": diffllama,
    # The bias is computed from the values.
    "doge": lambda c: decoder(c, bias="dense"),
    "falcon_mq": lambda c: decoder(c, kv_heads=1),
    "falcon_new": lambda c: decoder(c, kv_heads=c.num_kv_heads),
    "flava_image": encoder,
    "funnel": funnel,
    "gemma2": query_scalar,
    "gemma3": query_scalar,
    "gpt2_scale_by_layer": scaled_by_layer,
    "gpt_bigcode": lambda c: decoder(c, kv_heads=1),
    "gpt_neo": gpt_neo,
    "gpt_oss": lambda c: decoder(c, sinks=True),
    "granite": lambda c: decoder(c, scale=c.attention_multiplier),
    "led": led,
    "llama4_text": llama4,
    "longformer": longformer,
    "longformer_global": longformer_global,
    "longt5_local": t5,
    "minicpm3": latent,
    "mobilebert": mobilebert,
    "mobilevit": mobilevit,
    "modernbert": modernbert,
    "mpnet": lambda c: encoder(c, bias=("relative", "table")),
    "mpt": lambda c: decoder(c, bias="alibi"),
    "mt5": t5,
    "nystromformer": approximate,
    "perceiver": perceiver,
    "prophetnet": prophetnet,
    "pvt": staged,
    "recurrent_gemma": recurrent_gemma,
    "reformer": reformer,
    "segformer": staged,
    "sew_d": disentangled,
    "siglip_vision": siglip,
    "swin": swin,
    "swinv2": swinv2,
    "switch_transformers": t5,
    "t5": t5,
    "timesformer": timesformer,
    "xlm": encoder,
    # A padded token still sees itself.
    "xlnet": lambda c: encoder(c, mask=(NONE, Mask("dense")), padded=ANY),
}

TEXT_PART: Final = ("gemma3",)
MASKLESS: Final = ("rwkv", "nystromformer", "perceiver")
