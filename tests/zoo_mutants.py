"""Ways to break a model that a comparison must notice."""

import contextlib
import re

import torch
import torch.nn.functional as F

MASKED = -50.0  # attention logits below this are masked ones


@contextlib.contextmanager
def _attention_patch(logits, sdpa):
    """Patch softmax (last of 3 or more axes) with logits(x), fused attention with sdpa(args)."""
    hits = []

    def softmax_of(original):
        def softmax(x, dim=None, *args, **kw):
            if x.dim() >= 3 and x.is_floating_point() and dim in (-1, x.dim() - 1):
                new = logits(x)
                if new is not x:
                    hits.append("softmax")
                    x = new
            return original(x, dim, *args, **kw)

        return softmax

    original_sdpa = F.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kw
    ):
        query, mask, causal, hit = sdpa(query, attn_mask, is_causal)
        hits.extend(["sdpa"] * hit)
        return original_sdpa(query, key, value, mask, dropout_p, causal, **kw)

    owners = [(F, "softmax"), (torch, "softmax"), (torch.Tensor, "softmax")]
    saved = [getattr(o, k) for o, k in owners]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for (o, k), f in zip(owners, saved, strict=True):
            setattr(o, k, softmax_of(f))
        F.scaled_dot_product_attention = scaled_dot_product_attention
        yield hits
    finally:
        for (o, k), f in zip(owners, saved, strict=True):
            setattr(o, k, f)
        F.scaled_dot_product_attention = original_sdpa
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _scaled(factor):
    """Attention logits times a factor; masked ones stay masked."""
    return _attention_patch(
        lambda x: torch.where(x < MASKED, x, x * factor),
        lambda q, mask, causal: (q * factor, mask, causal, True),
    )


def _unmasked():
    """Causal, window and padding masks ignored (a masked logit of a softmax counts as 0)."""

    def logits(x):
        hidden = x < MASKED
        return x.masked_fill(hidden, 0.0) if hidden.any() else x

    def sdpa(q, mask, causal):
        if mask is None or mask.dtype == torch.bool:
            return q, None, False, causal or mask is not None
        return q, mask.masked_fill(mask < MASKED, 0.0), False, bool((mask < MASKED).any())

    return _attention_patch(logits, sdpa)


@contextlib.contextmanager
def _hooked(register):
    """Hooks that register(hits) puts on; removed at exit."""
    hits = []
    handles = register(hits)
    try:
        yield hits
    finally:
        for h in handles:
            h.remove()


def _unpadded(model):
    """The padding mask ignored."""

    def register(hits):
        def hook(module, args, kwargs):
            mask = kwargs.get("attention_mask")
            if mask is not None and not mask.all():
                hits.append("attention_mask")
                return args, {**kwargs, "attention_mask": torch.ones_like(mask)}
            return None

        return [model.register_forward_pre_hook(hook, with_kwargs=True)]

    return _hooked(register)


def _sin_cos_off(t):
    """A [sin | cos] table of angle 0."""
    half = t.shape[-1] // 2
    return torch.cat([torch.zeros_like(t[..., :half]), torch.ones_like(t[..., half:])], -1)


def _unrotated(model):
    """Rotary position embedding replaced by the identity; None where the model has none."""
    rotary = [
        m
        for m in model.modules()
        if re.search(r"Rotary|Rope|RoFormerSinusoidal", type(m).__name__) and not list(m.children())
    ]
    tables = [
        m for m in model.modules() if isinstance(getattr(m, "embed_positions", None), torch.Tensor)
    ]
    if (not rotary and not tables) or getattr(model.config, "alibi", False):
        return None

    def register(hits):
        def hook(module, args, kwargs, out):
            hits.append("rotary")
            if isinstance(out, torch.Tensor):
                return torch.ones_like(out) if out.is_complex() else _sin_cos_off(out)
            if [getattr(a, "shape", None) for a in args[:2]] == [o.shape for o in out]:
                return tuple(args[:2])  # rotates (query, key) itself
            return torch.ones_like(out[0]), torch.zeros_like(out[1])

        return [m.register_forward_hook(hook, with_kwargs=True) for m in rotary]

    @contextlib.contextmanager
    def run():
        saved = [m.embed_positions for m in tables]
        try:
            with _hooked(register) as hits:
                for m, t in zip(tables, saved, strict=True):
                    m.embed_positions = _sin_cos_off(t)
                    hits.append("rotary")
                yield hits
        finally:
            for m, t in zip(tables, saved, strict=True):
                m.embed_positions = t

    return run()


def mutants(model):
    """Yield (label, context manager) for each way to break the model.

    "scale": attention logits times 1.1; "mask": causal, window and padding masks ignored;
    "padding": attention_mask ignored; "rotary": rotary embedding disabled, where there is one.
    `with` gives a list that stays empty if the forward had nothing to break. A softmax over the
    last of 3 or more axes counts as attention.
    """
    yield "scale", _scaled(1.1)
    yield "mask", _unmasked()
    yield "padding", _unpadded(model)
    rotary = _unrotated(model)
    if rotary is not None:
        yield "rotary", rotary
