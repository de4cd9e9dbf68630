"""The config of a tier-2 directory, known to AutoConfig from the moment that it exists."""

from types import ModuleType

from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "attnopt"


class AttnoptConfig(PreTrainedConfig):
    """What config.json of such a directory says; the model has the config of its source."""

    model_type = MODEL_TYPE


def register(module: ModuleType) -> None:
    """Make the model type known; `module` is where Transformers keeps its own."""
    module.CONFIG_MAPPING.register(MODEL_TYPE, AttnoptConfig, exist_ok=True)
