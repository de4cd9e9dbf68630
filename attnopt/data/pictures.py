"""Pictures become pixel values: image files through Pillow and the model's own processor."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from attnopt.data.arrays import LABELS, labels_at
from attnopt.data.sources import IMAGES, files

_MOST_PIXELS: Final = 2**26
_FORMATS: Final = ("PNG", "JPEG")


def pictures(
    root: Path, processor: Any, wanted: Callable[[str], bool], count: int
) -> dict[str, Tensor]:
    """Return the pixel values, and the classes, of at most `count` pictures of wanted names.

    The classes are those of `labels.npy`, one for each file in the order of the names.
    """
    found = list(files(root, IMAGES))
    chosen = [i for i, p in enumerate(found) if wanted(p.relative_to(root).as_posix())][:count]
    if not chosen:
        return {}
    made = {"pixel_values": _processed([_opened(found[i]) for i in chosen], processor, root)}
    if (root / LABELS).is_file():
        made["labels"] = labels_at(root / LABELS, len(found))[chosen]
    return made


def pixels_of(images: Tensor, processor: Any) -> Tensor:
    """Return the pixel values of bytes, (rows, height, width) with channels before or after.

    Without a processor they are divided by 255.
    """
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.movedim(-1, 1)
    if processor is None:
        return images.float() / 255
    return _processed(list(images), processor, "the array")


def _processed(images: list[Any], processor: Any, where: Any) -> Tensor:
    if processor is None:
        raise ValueError(
            f"{where}: the model's directory has no preprocessor_config.json that says how pixels "
            "are scaled; give pixel values as a .npy file of floats"
        )
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(pixels).float()


def _opened(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            f"{path} needs Pillow to be read: pip install 'attnopt[images]', or give .npy arrays"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                return image.convert("RGB")
        except (
            *(OSError, ValueError, SyntaxError),
            *(Image.DecompressionBombError, Image.DecompressionBombWarning),
        ) as error:
            raise ValueError(f"{path} is no PNG or JPEG that can be read: {error}") from error
