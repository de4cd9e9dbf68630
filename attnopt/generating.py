"""Lowered causal language models: `generate()` of Transformers over a program's own state."""

import copy
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from attnopt.backends import Backend
from attnopt.frontend.caches import StateCache
from attnopt.lowering import Runs
from attnopt.program import Program


class LoweredTransformer(Runs, PreTrainedModel):
    """A program of a Transformers model, called as its source is called."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, program: Program, backend: Backend):
        super().__init__(copy.deepcopy(program.config))
        self.hold(program, backend)
        parts = (program, *program.parts.values())
        self.inputs = {b.name for p in parts for b in p.bindings.values() if b.kind == "input"}
        first = ("input_ids", "pixel_values", "input_values", "input_features")
        self.main_input_name = next((n for n in first if n in self.inputs), "input_ids")

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Take a config with any choice of how experts run: the graph has made it already."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program as its source is called."""
        return self.run(args, kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a lowered model is made for running."""
        raise TypeError("a lowered model is made for running: save the program it came from")


class Generates(LoweredTransformer, GenerationMixin):
    """What lowered models that generate have in common; their cache holds the program's states."""

    def __init__(self, program: Program, backend: Backend):
        super().__init__(program, backend)
        self.generation_config = copy.deepcopy(program.source.generation_config)
        parts = (program, *program.parts.values())
        # State space models call their cache by a name of their own.
        self.cache_name = str(getattr(program.form.made_of, "argument", "past_key_values"))
        # States of constant size have no place for a mask of what they have seen.
        self.sees_past = any(s.counts for p in parts for s in p.states)
        self.accepted = {
            *self.inputs,
            self.cache_name,
            "encoder_outputs",
            "use_cache",
            "return_dict",
        }

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of a step that the captured graphs have."""
        mixin: Any = GenerationMixin
        if not self.program.states:
            kwargs["next_sequence_length"] = None  # without a cache, each step reads the whole text
        prepared = mixin.prepare_inputs_for_generation(self, *args, **kwargs)
        mask, ids = prepared.get("attention_mask"), prepared.get("input_ids")
        if not self.sees_past and mask is not None and ids is not None:
            prepared["attention_mask"] = mask[:, -ids.shape[1] :]
        return {name: x for name, x in prepared.items() if name in self.accepted}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Refuse what no captured graph takes; `forward` does not name all that they take."""
        mixin: Any = GenerationMixin
        others = {n: x for n, x in model_kwargs.items() if n not in self.accepted}
        mixin._validate_model_kwargs(self, others)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Start from an empty state of the program."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a lowered model "
                "keeps its own state; leave cache_implementation out"
            )
        if generation_config.use_cache is not False and self.program.states:
            model_kwargs.setdefault(self.cache_name, StateCache((), {}, 0))
        return False


class LoweredLanguageModel(Generates):
    """A program as a causal language model."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the program as its source is called; without a cache it starts anew."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self.cache_name: past_key_values,
            **kwargs,
        }
        result = self.run((), {name: x for name, x in given.items() if x is not None})
        if use_cache is False and self.cache_name in result:
            result[self.cache_name] = None
        return result
