"""One random case as plain data: which spelling of each part of an attention to use.

Every field's default is its simplest value, so that shrinking a case means resetting fields.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any, Final

MAX_POSITIONS: Final = 64
STATIC_LENGTH: Final = 12
IMAGE: Final = (4, 6)
POOL_QUERIES: Final = 3


@dataclass(frozen=True)
class Spec:
    kv_heads: int = 2
    groups: int = 1
    head_dim: int = 4
    v_head_dim: int = 4
    source: str = "self"
    projection: str = "separate"
    unpack: str = "unbind"
    projection_bias: bool = False
    layout: str = "bhtd"
    contraction: str = "matmul"
    gqa: str = "repeat_interleave"
    scale_place: str = "scores_mul"
    scale: float = 0.0
    mask: str = "none"
    mask_made: str = "compare"
    mask_form: str = "fill_min"
    size: int = 3
    padding: str = "none"
    pad_dtype: str = "int64"
    bias: str = "none"
    bias_order: str = "before_mask"
    shared_bias: bool = False
    softcap: float = 0.0
    sinks: str = "none"
    softmax: str = "functional"
    rotary: str = "none"
    rotary_place: str = "bthd"
    qk_norm: str = "none"
    dropout: str = "none"
    output: str = "linear"
    returns: str = "output"
    partition: str = "none"
    stack: str = "bare"
    layers: int = 1
    twice: bool = False
    dtype: str = "float32"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def width(self) -> int:
        """Channels of the model."""
        own = self.projection in ("none", "nn_mha")
        return self.heads * self.head_dim if own else 12

    @property
    def scale_number(self) -> float:
        """The factor on the scores; 0 in `scale` stands for the usual one."""
        if self.scale_place == "none":
            return 1.0
        return self.scale or self.head_dim**-0.5

    @property
    def static_length(self) -> bool:
        """Whether only the batch is dynamic."""
        return self.partition != "none" or self.layout == "blocked"

    def described(self) -> dict[str, Any]:
        """Return the fields that are not the simplest."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }


FUSED: Final = (
    "fused_3hd",
    "fused_h3d",
    "fused_group",
    "conv1d",
    "conv1x1",
    "conv2d",
    "functional",
)
LAYOUTS: Final = (
    "bhtd", "bthd", "bmm", "seq_first", "grouped", "mqa_folded", "no_head_axis", "blocked",
)  # fmt: skip

CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "kv_heads": (1, 1, 2, 2, 3, 4),
    "groups": (1, 1, 1, 2, 3),
    "head_dim": (4, 4, 8, 6, 16),
    "v_head_dim": (0, 0, 0, 0, 2, 5, 12),
    "source": ("self", "self", "self", "self", "cross", "pool", "raw"),
    "projection": (
        "separate", "separate", *FUSED, "weight_split", "einsum", "kv_fused", "shared_qk",
        "shared_kv", "mla", "nn_mha", "none",
    ),
    "unpack": ("unbind", "index", "chunk", "split", "slice", "permute"),
    "projection_bias": (False, True),
    "layout": (*LAYOUTS, "bhtd", "bhtd"),
    "contraction": ("matmul", "matmul", "einsum", "sum", "transposed"),
    "gqa": ("repeat_interleave", "expand", "index_select", "tile", "broadcast", "cat"),
    "scale_place": (
        "none", "q", "k", "sqrt_both", "scores_mul", "scores_div", "buffer", "tensor", "baddbmm",
        "softmax_arg", "q_div",
    ),
    "scale": (0.0, 0.0, 0.0, 0.3, 0.0625, 1.7),
    "mask": (
        "none", "none", "causal", "causal", "causal", "sliding", "two_sided", "chunked", "prefix",
        "block",
    ),
    "mask_made": ("compare", "tril", "buffer"),
    "mask_form": (
        "fill_min", "fill_inf", "add_inf", "add_min", "add_1e4", "where", "multiply", "triu_inf",
    ),
    "size": (2, 3, 4, 5),
    "padding": ("none", "none", "none", "additive", "where", "masked_fill", "precombined"),
    "pad_dtype": ("int64", "bool", "float"),
    "bias": (
        "none", "none", "none", "none", "alibi", "alibi_keys", "alibi_abs", "t5", "table",
        "dense_parameter", "dense_input",
    ),
    "bias_order": ("before_mask", "after_mask"),
    "shared_bias": (False, True),
    "softcap": (0.0, 0.0, 0.0, 0.0, 5.0, 30.0),
    "sinks": ("none", "none", "none", "none", "none", "concat", "concat_max", "denominator"),
    "softmax": (
        "functional", "functional", "torch", "positive_dim", "method", "dtype32", "upcast",
        "manual", "manual_max", "manual_late", "logsumexp", "log_softmax", "safe", "sdpa", "sdpa",
        "sdpa_causal",
    ),
    "rotary": ("none", "none", "none", "half", "interleaved", "complex", "partial", "joint"),
    "rotary_place": ("bthd", "bhtd"),
    "qk_norm": ("none", "none", "none", "none", "rms", "layer", "full", "cosine", "cosine_learned"),
    "dropout": ("none", "none", "module", "functional"),
    "output": ("linear", "linear", "none", "einsum", "conv1d", "gated"),
    "returns": ("output", "output", "output", "output", "weights", "mean_weights"),
    "partition": ("none", "none", "none", "none", "none", "window", "shifted", "rows"),
    "stack": (
        "bare", "bare", "bare", "sequential", "list", "pre_norm", "post_norm", "parallel",
        "decoder",
    ),
    "layers": (1, 1, 2, 3),
    "twice": (False, False, False, False, True),
    "dtype": ("float32", "float32", "float32", "float32", "float32", "bfloat16", "float64"),
}  # fmt: skip

NEGATIVE_INFINITY: Final = ("fill_inf", "add_inf", "triu_inf")
NO_MAXIMUM: Final = ("manual", "manual_late")
SDPA: Final = ("sdpa", "sdpa_causal")
POSITIONAL: Final = ("alibi", "alibi_keys", "alibi_abs", "t5", "table", "dense_parameter")
PLAIN_MASK: Final = {"mask": "none", "padding": "none"}
Rule = tuple[str, Callable[[Spec], bool], dict[str, Any]]

RULES: Final[tuple[Rule, ...]] = (
    ("nn.MultiheadAttention is one piece", lambda s: s.projection == "nn_mha", {
        "groups": 1, "layout": "bhtd", "contraction": "matmul", "softcap": 0.0, "sinks": "none",
        "bias": "none", "rotary": "none", "qk_norm": "none", "scale_place": "scores_mul",
        "scale": 0.0, "softmax": "functional", "output": "linear", "dropout": "none",
        "head_dim": 4, "v_head_dim": 0, "partition": "none"}),
    ("its mask is causal or none", lambda s: s.projection == "nn_mha" and s.mask != "none", {
        "mask": "causal"}),
    ("its padding is one bool mask", lambda s: s.projection == "nn_mha" and s.padding != "none", {
        "padding": "precombined"}),
    ("raw inputs have no projections", lambda s: s.source == "raw", {
        "projection": "separate", "stack": "bare", "layers": 1, "twice": False, "output": "none",
        "partition": "none"}),
    ("raw inputs are batch first", lambda s: s.source == "raw" and s.layout == "seq_first", {
        "layout": "bmm"}),
    ("one layer is never shared", lambda s: s.layers == 1 or s.stack == "decoder", {
        "shared_bias": False}),
    ("a bare stack has one layer", lambda s: s.stack == "bare", {
        "layers": 1, "shared_bias": False}),
    ("a pool ends the model", lambda s: s.source == "pool", {
        "stack": "bare", "layers": 1, "twice": False, "shared_bias": False}),
    ("a stack passes one tensor on", lambda s: s.stack != "bare" or s.twice, {
        "returns": "output"}),
    ("a decoder starts from itself", lambda s: s.stack == "decoder", {
        "source": "self", "partition": "none", "twice": False}),
    ("keys of another length have no positions", lambda s: s.source in ("cross", "pool"), {
        "mask": "none", "rotary": "none", "partition": "none"}),
    ("their bias is given", lambda s: s.source in ("cross", "pool") and s.bias in POSITIONAL, {
        "bias": "none"}),
    ("fused q, k, v come from one input", lambda s: (
        s.source in ("cross", "pool") and s.projection in (*FUSED, "mla", "shared_qk")), {
        "projection": "kv_fused"}),
    ("learned queries meet projected keys", lambda s: (
        s.source == "pool" and s.projection == "none"), {"projection": "separate"}),
    ("one weight for q and k", lambda s: s.projection == "shared_qk", {"groups": 1}),
    ("one weight for k and v", lambda s: s.projection == "shared_kv", {"v_head_dim": 0}),
    ("no projection: one width for all", lambda s: s.projection == "none", {
        "groups": 1, "v_head_dim": 0}),
    ("fused along the heads", lambda s: s.projection in ("fused_3hd", "fused_h3d"), {
        "groups": 1, "v_head_dim": 0}),
    ("fused along the channels", lambda s: s.projection in FUSED, {"v_head_dim": 0}),
    ("latent keys have all heads", lambda s: s.projection == "mla", {"groups": 1}),
    ("image partitions have no padding", lambda s: s.partition != "none", {
        "padding": "none", "mask": "none"}),
    ("blocks have their own mask", lambda s: s.layout == "blocked", {
        **PLAIN_MASK, "bias": "none", "sinks": "none", "partition": "none", "source": "self",
        "softcap": 0.0}),
    ("blocks and pieces", lambda s: s.layout == "blocked" and s.projection == "nn_mha", {
        "layout": "bhtd"}),
    ("blocks and sdpa", lambda s: s.layout == "blocked" and s.softmax in SDPA, {
        "softmax": "functional"}),
    ("blocks in decoders", lambda s: s.layout == "blocked" and s.stack == "decoder", {
        "stack": "list"}),
    ("no head axis: one head", lambda s: s.layout == "no_head_axis", {"kv_heads": 1, "groups": 1}),
    ("folded heads share their keys", lambda s: s.layout == "mqa_folded", {
        "kv_heads": 1, "gqa": "broadcast"}),
    ("groups are consecutive", lambda s: s.layout == "grouped" and s.gqa in ("tile", "cat"), {
        "gqa": "repeat_interleave"}),
    ("broadcast needs one key head", lambda s: s.gqa == "broadcast" and s.kv_heads > 1, {
        "gqa": "expand"}),
    ("flat batches do not broadcast", lambda s: (
        s.gqa == "broadcast" and s.layout in ("bmm", "seq_first", "blocked", "bthd")), {
        "gqa": "expand"}),
    ("sdpa is one piece", lambda s: s.softmax in SDPA, {
        "softcap": 0.0, "sinks": "none", "layout": "bhtd", "contraction": "matmul",
        "scale_place": "scores_mul", "returns": "output"}),
    ("is_causal means causal", lambda s: s.softmax == "sdpa_causal", {
        "mask": "causal", "padding": "none", "bias": "none"}),
    ("is_causal needs as many keys", lambda s: (
        s.softmax == "sdpa_causal" and (s.source in ("cross", "pool") or s.partition != "none")), {
        "softmax": "sdpa", "mask": "none"}),
    ("baddbmm takes flat batches", lambda s: (
        s.scale_place == "baddbmm" and s.layout not in ("bmm", "seq_first")), {
        "scale_place": "scores_mul"}),
    ("flat batches take bmm", lambda s: s.layout in ("bmm", "seq_first", "mqa_folded"), {
        "contraction": "matmul"}),
    ("a late scale is small and alone", lambda s: s.scale_place == "softmax_arg" and (
        s.softcap > 0 or s.sinks != "none" or s.scale > 1), {"scale_place": "scores_mul"}),
    ("sinks need a plain softmax", lambda s: s.sinks != "none", {
        "softmax": "functional", "returns": "output"}),
    ("a late division fits the layout", lambda s: s.softmax == "manual_late" and (
        s.layout not in ("bhtd", "bmm", "seq_first", "grouped") or s.returns != "output"), {
        "softmax": "manual_max"}),
    ("an early exp keeps scores small", lambda s: (
        s.softmax in NO_MAXIMUM and (s.scale > 1 or s.scale_place == "none")), {
        "softmax": "manual_max"}),
    ("multiplied masks come last", lambda s: s.mask_form == "multiply", {
        "bias_order": "before_mask"}),
    ("a triangle is causal", lambda s: s.mask_form == "triu_inf" and s.mask != "causal", {
        "mask_form": "add_inf"}),
    ("precombined masks are boolean", lambda s: (
        s.padding == "precombined" and s.mask_form in ("triu_inf", "multiply")), {
        "mask_form": "fill_min"}),
    ("buffers are made for fixed kinds", lambda s: s.mask == "none", {
        "mask_made": "compare", "mask_form": "fill_min"}),
    ("rotary channels come in pairs", lambda s: s.rotary != "none" and s.head_dim % 2, {
        "rotary": "none"}),
    ("shifted windows add a view of the scores", lambda s: s.partition == "shifted", {
        "layout": "bhtd"}),
    ("shifted windows spell their scores", lambda s: (
        s.partition == "shifted" and s.softmax in SDPA), {"softmax": "functional"}),
    ("positions of a table", lambda s: s.bias == "none", {"shared_bias": False}),
    ("given biases are not shared", lambda s: s.bias == "dense_input", {"shared_bias": False}),
    ("images have no given bias", lambda s: (
        s.partition != "none" and s.bias == "dense_input"), {"bias": "dense_parameter"}),
    ("unprojected heads keep the width", lambda s: (
        s.output == "none" and s.stack != "bare"), {"output": "linear"}),
    ("nn.Sequential passes one tensor", lambda s: s.stack == "sequential" and (
        s.source != "self" or s.partition == "shifted" or s.padding != "none"
        or s.bias == "dense_input" or s.shared_bias), {"stack": "list"}),
    ("a row alone in its block is not padding", lambda s: (
        s.mask in ("chunked", "block") and not robust(s)), {"padding": "none"}),
    ("called twice: same width", lambda s: s.twice and s.output == "none", {"output": "linear"}),
)  # fmt: skip


def sample(rng: Random) -> Spec:
    """Draw a case; many parts keep their simplest form, so that causes are told apart."""
    plain = rng.choice((0.2, 0.5, 0.7))
    drawn = {name: rng.choice(values) for name, values in CHOICES.items() if rng.random() >= plain}
    return repair(replace(Spec(), **{"v_head_dim": 0, **drawn}))


def repair(spec: Spec) -> Spec:
    """Reset what does not go together, until every rule holds."""
    for _ in range(10):
        before = spec
        for _, applies, changes in RULES:
            if applies(spec):
                spec = replace(spec, **changes)
        spec = replace(spec, v_head_dim=_v_head_dim(spec))
        if spec == before:
            return spec
    raise AssertionError(f"the rules disagree about {spec.described()}")


def _v_head_dim(spec: Spec) -> int:
    same = spec.projection in (*FUSED, "shared_kv", "none", "nn_mha")
    return spec.head_dim if same or not spec.v_head_dim else spec.v_head_dim


def robust(spec: Spec) -> bool:
    """Whether a row that sees nothing stays finite in the source."""
    finite_mask = spec.mask == "none" or spec.mask_form not in NEGATIVE_INFINITY
    one_mask = spec.mask == "none" or spec.padding in ("precombined", "where", "masked_fill")
    maximum = spec.softmax not in NO_MAXIMUM and spec.projection != "nn_mha"
    narrowed = spec.dtype == "float64" and spec.softmax in ("dtype32", "upcast")
    return finite_mask and one_mask and maximum and not narrowed
