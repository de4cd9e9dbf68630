"""What ops do otherwise while a model is healed: less than they are for at first, and a loss.

A rewrite that changes much is easier to heal from where nothing is changed yet: a call then has the
options of no strength, and comes to its own while the run goes on. Inference knows nothing of this.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

Options = dict[str, Any]


def _as_they_are(share: float, *args: Any, **options: Any) -> Mapping[str, Any]:
    return options


@dataclass(frozen=True)
class Training:
    """How an op is called in training.

    `options(share, *args, **options)` are the options of a call at a share, 0 to 1, of the way to
    full strength; `loss(*args, **options)` is what a call adds to what is minimised.
    """

    options: Callable[..., Mapping[str, Any]] = _as_they_are
    loss: Callable[..., Tensor] | None = None


@cache
def trainings() -> dict[Any, Training]:
    """Return the ops that are called otherwise in training."""
    from attnopt.ops import gates

    return {
        gates.norm_gates: Training(gates.norm_options),
        gates.fitted_gates: Training(gates.norm_options),
        gates.router_gates: Training(gates.router_options, gates.router_loss),
    }
