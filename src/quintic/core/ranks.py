"""The processes that train together, as far as most code needs to know them.

What is asked of them is small: sums of numbers, agreement on a flag, what each has to tell, an order of who goes first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quintic.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ALONE", "Ranks"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Example:
        >>> alone = Ranks()
        >>> alone.is_main, alone.sum(2.5, 1), alone.any(False)
        (True, (2.5, 1.0), False)
    """

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    """("replicate", "shard"); None for one process."""
    group: Any = None
    """Process group of the conversations below; None is that of all communication."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """How many ranks hold one copy of weights and optimizer state together."""
        return 1 if self.mesh is None else self.mesh["shard"].size()

    @property
    def shard(self) -> int:
        """Number of this rank among the shards of the first replica; -1 in another replica, which holds the same."""
        if self.mesh is None:
            return 0
        return -1 if self.mesh.get_local_rank("replicate") else self.mesh.get_local_rank("shard")

    def turns(self, count: int) -> Iterator[int | None]:
        """The numbers below a count that are this rank's; all ranks get as many, None where one has none left.

        Example:
            >>> [list(Ranks(rank, 2).turns(3)) for rank in range(2)]
            [[0, 2], [1, None]]
        """
        for first in range(0, count, self.world):
            number = first + self.rank
            yield number if number < count else None

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Sums over all ranks, in float64."""
        if self.mesh is None:
            return tuple(float(number) for number in numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self.sum_(values)
        return tuple(values.tolist())

    def sum_(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; all ranks get the same answer."""
        return flag if self.mesh is None else self.sum(float(flag))[0] > 0

    def gather(self, mine: _T) -> list[_T]:
        """What every rank has given, by rank; anything that can be pickled."""
        if self.mesh is None:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def together(self, act: Callable[[], _T]) -> list[_T]:
        """What every rank's act returns, by rank; if one fails, all do.

        Raises:
            CheckpointError: Another rank failed, in its words.
            Exception: This one failed.
        """
        found, error = None, None
        try:
            found = act()
        except Exception as caught:
            error = caught
        answers: list[tuple[Any, str | None]] = self.gather((found, None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(answers):
            if problem is not None:
                raise CheckpointError(f"rank {rank}: {problem}")
        return [answer for answer, _ in answers]

    def apart(self) -> Ranks:
        """The same processes with a process group of their own, for another thread; all ranks call this."""
        if self.mesh is None:
            return self
        return replace(self, group=dist.new_group(backend="gloo"))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.mesh is not None:
            dist.barrier(group=self.group)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank runs the body, then the others: what it has prepared they find.

        Raises:
            CheckpointError: The main rank failed, in its words; the others do not begin.
        """
        if not self.is_main and (problem := self.gather(None)[0]) is not None:
            raise CheckpointError(f"rank 0: {problem}")
        try:
            yield
        except Exception as error:
            if self.is_main:
                self.gather(str(error))
            raise
        if self.is_main:
            self.gather(None)


ALONE = Ranks()
"""One process that trains by itself."""
