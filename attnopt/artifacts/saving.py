"""Save a result: a plain Transformers directory, with plan, statistics and report beside it."""

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import nn

from attnopt.artifacts.card import card
from attnopt.artifacts.manifest import FOLDER, NAME, write_manifest
from attnopt.artifacts.programs import SHARD, write_stored
from attnopt.artifacts.programs import UNDERSTANDS as PROGRAM
from attnopt.artifacts.staging import staged
from attnopt.artifacts.stock import build, hollow, stock_form, tier_of
from attnopt.artifacts.streaming import write_checkpoint
from attnopt.nouns import No, Plan
from attnopt.perlayer import UNDERSTANDS as PER_LAYER
from attnopt.program import Program
from attnopt.reporting import content_of, page
from attnopt.untrusted import leaves, runs_code
from attnopt.verifying import Report

_MUST_UNDERSTAND = ((), PER_LAYER, PROGRAM)

# What a checkpoint directory may hold beside its weights, and what is carried over.
_CARRIED = re.compile(
    r"(tokenizer.*\.(json|model)|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|"
    r"added_tokens\.json|chat_template\.(jinja|json)|.*\.(spm|bpe\.model)|sentencepiece.*\.model|"
    r"(pre)?processor_config\.json|(video_)?preprocessor_config\.json|generation_config\.json|"
    r"LICENSE.*|NOTICE.*|USE_POLICY.*)"
)


@dataclass(frozen=True)
class Result:
    """What `optimize` hands back: the rewritten program, how it was made, and what was measured.

    `recipe` is the text of what was wanted, where that was said as a recipe.
    """

    program: Program
    reference: Program
    plan: Plan
    report: Report | None = None
    measured: Mapping[str, Any] | None = None
    command: str = ""
    recipe: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the quality gate was passed."""
        return self.report is None or self.report.accepted


def save(
    result: Result | Program,
    out: str | os.PathLike[str],
    *,
    tier: Literal[0, 1, 2] | None = None,
    max_shard_size: int = SHARD,
) -> Path:
    """Write an artifact in one step: `out` is what it was before, or the whole new artifact.

    The tier is the lowest that can hold the program, or the one that is asked for: 0 a stock
    checkpoint, 1 one whose layers differ, 2 the program itself. Weight files hold at most
    `max_shard_size` bytes, or a single tensor.
    """
    made = result if isinstance(result, Result) else Result(result, result, Plan(()))
    target = Path(out).absolute()
    refuse_foreign(target, made.program)
    model = _held_by(made.program, tier)
    with staged(target) as staging:
        write(made, model, staging, max_shard_size)
    return target


def _held_by(program: Program, tier: int | None) -> nn.Module | None:
    """Return the stock model that is to hold a program, without its weights; None where the program
    is stored as itself.
    """
    if tier not in (None, 0, 1, 2):
        raise ValueError(f"tier {tier!r}: it is 0, 1 or 2")
    if tier == 2:
        return None
    form = _stock_form(program)
    if isinstance(form, No):
        if tier is None:
            return None
        raise ValueError(f"cannot save as a Transformers checkpoint (tier {tier}): {form}")
    needed = tier_of(form[1])
    if tier is not None and needed > tier:
        raise ValueError(
            f"cannot save as a stock checkpoint (tier 0): layers differ, which needs tier {needed}"
        )
    return hollow(*form, program.weights)


def refuse_foreign(target: Path, program: Program | None = None) -> None:
    """Raise ValueError where a directory is not ours to replace."""
    source = source_folder(program) if program is not None else None
    if source is not None and target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source itself; choose another directory")
    above = next(p for p in target.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "cannot be written to" if above.is_dir() else "is a file"
        raise ValueError(f"{target} cannot be made: {above} {why}; name another directory")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} is a file or a link; name a new directory")
    if target.is_dir() and any(target.iterdir()) and not (target / NAME).is_file():
        raise ValueError(
            f"{target} holds something that attnopt did not write (no {NAME}); choose another "
            "directory, or remove it"
        )


def stock_model(program: Program) -> nn.Module | No:
    """Return the program as a model of its stock class, or why there is none."""
    form = _stock_form(program)
    return form if isinstance(form, No) else build(*form, program.weights)


def needed_tier(program: Program) -> int:
    """Return the lowest tier that can hold a program."""
    form = _stock_form(program)
    return 2 if isinstance(form, No) else tier_of(form[1])


def _stock_form(program: Program) -> tuple[Any, Any] | No:
    """Return the stock class of a program and the config that it needs, or why there is none."""
    if program.tier > 1:
        return No("it computes what no stock class does")
    form = stock_form(program)
    if not isinstance(form, No):
        form[1].name_or_path = ""
    return form


def source_folder(program: Program) -> Path | None:
    """Return the directory of the checkpoint that a program was captured from."""
    name = getattr(program.config, "name_or_path", "")
    return Path(name) if name and (Path(name) / "config.json").is_file() else None


def write(result: Result, model: Any, staging: Path, shard: int = SHARD) -> None:
    """Write every file of an artifact, the manifest last; without a model, the program itself.

    A model without memory is written with the weights of the program.
    """
    if model is None:
        write_stored(result.program, staging, shard=shard)
    elif any(p.is_meta for p in model.parameters()):
        write_checkpoint(model, result.program.weights, staging, shard)
    else:
        model.save_pretrained(staging, max_shard_size=shard)
    _write_generation(result.program, staging)
    source = source_folder(result.program)
    if source is not None:
        carry_over(source, staging)
    folder = staging / FOLDER
    folder.mkdir(exist_ok=True)
    result.plan.save(folder / "plan.yaml")
    if result.recipe:
        (folder / "recipe.yaml").write_text(result.recipe, encoding="utf-8")
    report, made_with = report_of(result, staging), environment(result)
    _write_json(folder / "report.json", report)
    _write_json(folder / "env.json", made_with)
    if "found" in report:
        (folder / "report.html").write_text(page(report, made_with), encoding="utf-8")
    tier = 2 if model is None else tier_of(model.config)
    text = card(result, made_with, tier)
    (staging / "README.md").write_text(text, encoding="utf-8")
    _mark(staging / "config.json", result, tier)
    write_manifest(staging)


def report_of(result: Result, place: Path | None = None) -> dict[str, Any]:
    """Return what was measured, as JSON values, of an artifact whose weights lie in `place`."""
    source = source_folder(result.reference)
    if source is None or place is None:
        return content_of(result)
    return content_of(result, (_weight_bytes(source), _weight_bytes(place)))


def _weight_bytes(root: Path) -> int:
    """Return the size of the weight files of a checkpoint or an artifact."""
    names = (*root.glob("*.safetensors"), *(root / FOLDER).glob("weights-*.safetensors"))
    return sum(place.stat().st_size for place in names)


def environment(result: Result) -> dict[str, Any]:
    """Return what the artifact was made with."""
    source = source_folder(result.reference)
    packages = ("attnopt", "torch", "transformers", "safetensors", "numpy", "scipy")
    return {
        "command": result.command,
        "base": None if source is None else source.name,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "packages": {name: version(name) for name in packages},
    }


def _write_generation(program: Program, staging: Path) -> None:
    """Write how the source generates, with flags that only sampling reads: others refuse those."""
    config = program.source.generation_config
    if config is not None:
        config.to_json_file(staging / "generation_config.json")


def carry_over(source: Path, staging: Path) -> None:
    """Copy the tokenizer and its like; links, code and pickles stay behind."""
    for place in sorted(source.iterdir()):
        carried = _CARRIED.fullmatch(place.name) and not runs_code(place.name)
        if carried and place.is_file() and not leaves(place):
            shutil.copyfile(place, staging / place.name)


def _mark(config: Path, result: Result, tier: int) -> None:
    """Say in config.json that attnopt made this; plain Transformers passes over the block."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["attnopt"] = {
        "format": 1,
        "min_reader": 1,
        "tier": tier,
        "must_understand": list(_MUST_UNDERSTAND[tier]),
        "accepted": result.accepted,
    }
    _write_json(config, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")
