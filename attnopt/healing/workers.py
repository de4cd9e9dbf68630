"""Several processes that heal one program together, each on rows of its own.

Started by torchrun, or with a process group that the caller made. Gradients are averaged, so that
N processes with a batch of B rows do what one does with N x B.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Workers:
    """This process among those that work together."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over the processes, in place."""
        if self.count == 1:
            return
        held = list(tensors)
        flat = torch.cat([t.flatten() for t in held])
        distributed.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(held, flat.split([t.numel() for t in held]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, value: bool) -> bool:
        """Tell whether it is so in any of the processes."""
        return bool(self.total(torch.tensor(float(value))) > 0) if self.count > 1 else value

    def wait(self) -> None:
        """Wait until all of them are here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def joined() -> Generator[Workers]:
    """Yield this process among its workers; under torchrun the group is made and left again."""
    if not distributed.is_available():
        yield Workers()
        return
    own = distributed.is_torchelastic_launched() and not distributed.is_initialized()
    if own:
        distributed.init_process_group("gloo")
    try:
        if distributed.is_initialized():
            yield Workers(distributed.get_rank(), distributed.get_world_size())
        else:
            yield Workers()
    finally:
        if own:
            distributed.destroy_process_group()
