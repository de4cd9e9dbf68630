"""Lowered encoder-decoders: `generate()` of Transformers over two programs, encode and decode.

"encode" runs the encoder and the first decoder tokens together, so generation holds the encoder's
inputs until then, and the encoder's result from then on.
"""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from attnopt.backends import Backend
from attnopt.generating import Generates
from attnopt.program import Program

_HIDDEN = "last_hidden_state"


class EncoderInputs(dict[str, Any]):
    """What the encoder reads, and what it gave once it has run."""


class LoweredSeq2Seq(Generates):
    """Two programs as an encoder-decoder that generates."""

    def __init__(self, program: Program, backend: Backend):
        super().__init__(program, backend)
        encoder: Any = getattr(self, "encoder", None)
        if encoder is not None:
            # Generation asks what holds the encoder's weights for the name of its input.
            encoder.main_input_name = self.main_input_name
        self.encoder_inputs = {n for n in self.inputs if n.startswith("input")}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the program as its source is called."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            **kwargs,
        }
        first = past_key_values is None or not past_key_values.get_seq_length()
        if isinstance(encoder_outputs, EncoderInputs):
            if first:
                given |= {n: x for n, x in encoder_outputs.items() if n != _HIDDEN}
                encoder_outputs = None
            else:
                encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[_HIDDEN])
        given |= {"encoder_outputs": encoder_outputs}
        given |= {"past_key_values": None if first else past_key_values}
        result = self.run((), {n: x for n, x in given.items() if x is not None})
        if use_cache is False:
            result.past_key_values = None
        return result

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: Any,
    ) -> dict[str, Any]:
        """Keep the encoder's inputs for the first step, which runs encoder and decoder."""
        held = EncoderInputs({model_input_name or self.main_input_name: inputs_tensor})
        for name in self.encoder_inputs & model_kwargs.keys():
            held[name] = model_kwargs.pop(name)
        model_kwargs["encoder_outputs"] = held
        return model_kwargs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Keep what the encoder gave in the first step."""
        held = model_kwargs.get("encoder_outputs")
        if isinstance(held, EncoderInputs) and _HIDDEN not in held:
            held[_HIDDEN] = outputs.encoder_last_hidden_state
        mixin: Any = GenerationMixin
        updated: dict[str, Any] = mixin._update_model_kwargs_for_generation(
            self, outputs, model_kwargs, *args, **kwargs
        )
        return updated
