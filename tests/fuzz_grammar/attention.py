"""One attention, spelled as its `Spec` says."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz_grammar.layouts import LAYOUTS
from fuzz_grammar.masks import Visible, additive, hide, hide_padding, upper_triangle
from fuzz_grammar.positions import Bias, QueryKeyNorm, Rotary
from fuzz_grammar.projections import PROJECTIONS, linear, weight
from fuzz_grammar.softmaxes import SOFTMAXES, with_sinks
from fuzz_grammar.spec import SDPA, Spec

NO_EXPANSION = ("grouped", "mqa_folded", "no_head_axis")


class Core(nn.Module):
    """From queries, keys and values to the output of each head and the weights."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.layout = LAYOUTS[spec.layout](spec)
        self.norm = QueryKeyNorm(spec) if spec.qk_norm != "none" else None
        self.rotary = Rotary(spec) if spec.rotary != "none" else None
        self.visible = Visible(spec) if spec.mask != "none" else None
        self.bias = Bias(spec) if spec.bias not in ("none", "dense_input") else None
        self.dropout = nn.Dropout(0.3) if spec.dropout == "module" else None
        if spec.sinks != "none":
            self.sinks = nn.Parameter(torch.randn(spec.heads))
        if spec.qk_norm == "cosine_learned":
            self.logit_scale = nn.Parameter(torch.log(5 + torch.rand(spec.heads, 1, 1)))
        self._constants(spec)

    def _constants(self, spec: Spec) -> None:
        if spec.scale_place == "buffer":
            self.register_buffer("factor", torch.tensor(spec.scale_number), persistent=False)
        if spec.gqa == "index_select":
            order = torch.arange(spec.heads) // spec.groups
            self.register_buffer("order", order, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> tuple[Tensor, Any]:
        q, k = self._positioned(q, k)
        q, k = self._scaled(q, k)
        if self.spec.layout not in NO_EXPANSION and not self._one_piece_gqa():
            k, v = self._expanded(k), self._expanded(v)
        q, k, v = self.layout.queries(q), self.layout.keys(k), self.layout.keys(v)
        if self.spec.rotary_place == "bhtd" and self.rotary is not None and self._heads_first():
            q, k = self.rotary(q, k, axis=2)
        if self.spec.softmax in SDPA:
            return self.layout.merge(self._sdpa(q, k, v, given)), None
        scores = self._score_scaled(self.layout.scores(q, k))
        scores = self._decorated(scores, given)
        out, weights = self._normalised(scores, v)
        return self.layout.merge(out), weights

    def _heads_first(self) -> bool:
        return self.spec.layout == "bhtd"

    def _one_piece_gqa(self) -> bool:
        return self.spec.softmax in SDPA and self.spec.gqa in ("repeat_interleave", "broadcast")

    def _positioned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm is not None:
            q, k = self.norm(q, k)
        if self.rotary is not None and not (
            self.spec.rotary_place == "bhtd" and self._heads_first()
        ):
            q, k = self.rotary(q, k, axis=0 if self.spec.layout == "seq_first" else 1)
        return q, k

    def _scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        place, scale = self.spec.scale_place, self.spec.scale_number
        if place == "q":
            return q * scale, k
        if place == "q_div":
            return q / (1 / scale), k
        if place == "k":
            return q, k * scale
        if place == "sqrt_both":
            return q * math.sqrt(scale), k * math.sqrt(scale)
        return q, k

    def _expanded(self, x: Tensor) -> Tensor:
        """Repeat the heads (axis 2) of keys or values."""
        s = self.spec
        if s.groups == 1 or s.gqa == "broadcast":
            return x
        if s.gqa == "repeat_interleave":
            return x.repeat_interleave(s.groups, dim=2)
        if s.gqa == "index_select":
            return x.index_select(2, self.order)
        if s.gqa == "tile":
            return x.repeat(1, 1, s.groups, 1)
        if s.gqa == "cat":
            return torch.cat([x] * s.groups, dim=2)
        a, b, heads, channels = x.shape
        x = x[:, :, :, None, :].expand(a, b, heads, s.groups, channels)
        return x.reshape(a, b, heads * s.groups, channels)

    def _score_scaled(self, scores: Tensor) -> Tensor:
        place, scale = self.spec.scale_place, self.spec.scale_number
        if self.spec.qk_norm == "cosine_learned":
            scores = scores * self.layout.fit(self.logit_scale.exp()[None])
        if place == "scores_mul":
            return scores * scale
        if place == "scores_div":
            return scores / (1 / scale)
        if place == "buffer":
            return scores * self.factor
        if place == "tensor":
            return scores / torch.full([], 1 / scale, dtype=scores.dtype)
        return scores

    def _decorated(self, scores: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Soft cap, bias, masks."""
        s = self.spec
        if s.softcap:
            scores = torch.tanh(scores / s.softcap) * s.softcap
        if s.bias_order == "before_mask":
            scores = self._biased(scores, given)
        scores = self._masked(scores, given)
        if s.bias_order == "after_mask":
            scores = self._biased(scores, given)
        if "shift_mask" in given:
            scores = self._shift_masked(scores, given["shift_mask"])
        return scores * s.scale_number if s.scale_place == "softmax_arg" else scores

    def _biased(self, scores: Tensor, given: dict[str, Tensor]) -> Tensor:
        bias = self._bias(given)
        if bias is None:
            return scores
        return scores + self.layout.fit(bias.to(scores.dtype))

    def _bias(self, given: dict[str, Tensor]) -> Tensor | None:
        for name in ("dense", "position_bias"):
            if name in given:
                return given[name]
        return None if self.bias is None else self.bias(given["queries"], given["keys"])

    def _masked(self, scores: Tensor, given: dict[str, Tensor]) -> Tensor:
        s, fit, padding = self.spec, self.layout.fit, given.get("padding")
        padding = None if padding is None else padding[:, None, None, :]
        if s.mask == "none" and padding is None:
            return scores
        if s.mask_form == "triu_inf":
            scores = scores + fit(upper_triangle(given["queries"], scores.dtype)[None, None])
        elif s.padding == "precombined":
            return hide(scores, fit(self._together(given, padding)), s.mask_form)
        elif self.visible is not None:
            scores = hide(scores, fit(self.visible(given["queries"])), s.mask_form)
        return scores if padding is None else hide_padding(scores, fit(padding), s.padding)

    def _together(self, given: dict[str, Tensor], padding: Tensor) -> Tensor:
        seen = padding.to(torch.bool)
        if self.visible is not None:
            return self.visible(given["queries"]) & seen
        return seen.expand(-1, 1, given["queries"], -1)

    def _shift_masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        heads, length = scores.shape[1], scores.shape[2]
        scores = scores.view(-1, mask.shape[0], heads, length, length)
        return (scores + mask[None, :, None]).view(-1, heads, length, length)

    def _normalised(self, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.spec
        if s.softmax == "manual_late":
            e = torch.exp(scores - scores.amax(-1, keepdim=True))
            return self.layout.values(e, v) / self.layout.rows(e.sum(-1, keepdim=True)), None
        if s.sinks == "none":
            weights = SOFTMAXES[s.softmax](scores)
        else:
            sink = self.layout.fit(self.sinks.view(1, -1, 1, 1))
            weights = with_sinks(scores, sink, s.sinks)
        return self.layout.values(self._dropped(weights), v), weights

    def _dropped(self, weights: Tensor) -> Tensor:
        if self.dropout is not None:
            return self.dropout(weights)
        if self.spec.dropout == "functional":
            return F.dropout(weights, p=0.3, training=self.training)
        return weights

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Tensor]) -> Tensor:
        s = self.spec
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if s.softmax == "sdpa_causal" else self._sdpa_mask(q, given),
            is_causal=s.softmax == "sdpa_causal",
            dropout_p=0.3 if s.dropout == "functional" and self.training else 0.0,
            scale=s.scale or None,
            enable_gqa=s.groups > 1 and self._one_piece_gqa(),
        )

    def _sdpa_mask(self, q: Tensor, given: dict[str, Tensor]) -> Tensor | None:
        s, bias, padding = self.spec, self._bias(given), given.get("padding")
        if "shift_mask" in given:
            raise AssertionError("shifted windows do not use one fused call")
        seen = None if self.visible is None else self.visible(given["queries"])
        if padding is not None:
            padding = padding[:, None, None, :].to(torch.bool)
            seen = padding.expand(-1, 1, q.shape[2], -1) if seen is None else seen & padding
        if bias is None and (seen is None or s.mask_form in ("fill_min", "fill_inf", "where")):
            return seen
        if seen is None:
            return bias.to(q.dtype)
        form = "add_min" if s.mask_form == "multiply" else s.mask_form
        added = additive(seen, form, q.dtype)
        return added if bias is None else added + bias.to(q.dtype)


class Output(nn.Module):
    """From the heads' outputs [A, B, heads, channels] back to the width of the model."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.style = spec.output
        inner = spec.heads * spec.v_head_dim
        if self.style == "einsum":
            self.weight = weight(spec.heads, spec.v_head_dim, spec.width, fan_in=inner)
        elif self.style == "conv1d":
            self.weight = weight(inner, spec.width, fan_in=inner)
            self.bias = nn.Parameter(torch.randn(spec.width) * 0.1)
        elif self.style != "none":
            self.o = linear(inner, spec.width, bias=spec.projection_bias)
        if self.style == "gated":
            self.gate = linear(spec.width, inner)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        if self.style == "einsum":
            return torch.einsum("abhe,hem->abm", out, self.weight)
        flat = out.reshape(out.shape[0], out.shape[1], -1)
        if self.style == "none":
            return flat
        if self.style == "conv1d":
            two = torch.addmm(self.bias, flat.reshape(-1, flat.shape[-1]), self.weight)
            return two.view(*flat.shape[:-1], -1)
        return self.o(flat * torch.sigmoid(self.gate(x)) if self.style == "gated" else flat)


class Attention(nn.Module):
    """Projections, core, output: [batch, length, width] to the same."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.projection = PROJECTIONS[spec.projection](spec)
        self.core = Core(spec)
        self.output = Output(spec)

    def position_bias(self, length: int) -> Tensor:
        return self.core.bias(length, length)

    def forward(self, x: Tensor, context: Tensor | None = None, **given: Tensor) -> Any:
        context = x if context is None else context
        sizes = {"queries": x.shape[1], "keys": context.shape[1]}
        length_first = self.spec.layout == "seq_first"
        if length_first:
            same = context is x
            x = x.transpose(0, 1)
            context = x if same else context.transpose(0, 1)
        q, k, v = self.projection(x, context)
        heads, weights = self.core(q, k, v, **sizes, **given)
        out = self.output(heads, x)
        out = out.transpose(0, 1) if length_first else out
        return returned(out, weights, self.spec)


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.attention = nn.MultiheadAttention(
            spec.width, spec.heads, bias=spec.projection_bias, batch_first=True
        )
        with torch.no_grad():
            self.attention.in_proj_weight.mul_(2)

    def forward(self, x: Tensor, context: Tensor | None = None, **given: Tensor) -> Any:
        context = x if context is None else context
        padding = given.get("padding")
        out, weights = self.attention(
            x,
            context,
            context,
            attn_mask=self._mask(x),
            key_padding_mask=None if padding is None else padding == 0,
            need_weights=self.spec.returns != "output",
            average_attn_weights=self.spec.returns == "mean_weights",
        )
        return out if weights is None else (out, weights)

    def _mask(self, x: Tensor) -> Tensor | None:
        if self.spec.mask == "none":
            return None
        return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


class Raw(nn.Module):
    """Queries, keys and values given by the caller."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.core = Core(spec)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> Any:
        sizes = {"queries": q.shape[1], "keys": k.shape[1]}
        heads, weights = self.core(q, k, v, **sizes, **given)
        return returned(heads.flatten(2), weights, self.spec)


def returned(out: Tensor, weights: Tensor | None, spec: Spec) -> Any:
    if weights is None or spec.returns == "output":
        return out
    return out, (weights.mean(1) if spec.returns == "mean_weights" else weights)


def attention(spec: Spec) -> nn.Module:
    """Build the attention of a spec."""
    return TorchAttention(spec) if spec.projection == "nn_mha" else Attention(spec)
