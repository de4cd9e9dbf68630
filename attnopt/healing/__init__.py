"""Healing: give a rewritten program back what the rewrite lost, by distillation from its source."""

from attnopt.healing.checkpoints import check as check_checkpoint
from attnopt.healing.checkpoints import remove as remove_checkpoint
from attnopt.healing.interrupts import Interrupted as Interrupted
from attnopt.healing.pipeline import Healing as Healing
from attnopt.healing.pipeline import heal as heal
from attnopt.healing.pipeline import healed as healed
from attnopt.healing.recipe import Recipe as Recipe

__all__ = [
    "Healing",
    "Interrupted",
    "Recipe",
    "check_checkpoint",
    "heal",
    "healed",
    "remove_checkpoint",
]
