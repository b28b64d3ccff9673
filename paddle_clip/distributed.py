"""The processes that train one model together, and what they send each other (`paddle.distributed`)."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Optional, TypeVar

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from .extras import STARTED_BY

Result = TypeVar("Result")

# Numbers in a gradient that is sent by itself. Smaller ones share a message: a message of all that a ViT-B/32 has is a
# copy of 605 MB, and taking it apart another.
_LARGE = 2**18

LAUNCHER_DIED = "the launcher of the training has died; start it again, with resume=True to go on from its checkpoint"


@dataclass(frozen=True)
class Ranks:
    """The processes of a training; by default this one alone.

    Every method is called by all processes, in the same order.

    Attributes:
        rank: place of this process, from 0.
        count: number of processes.
        launcher: id of the process that started this one and stops it if another one fails; None if there is none.
    """

    rank: int = 0
    count: int = 1
    launcher: Optional[int] = None

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one process after the other, without gradients: [B, …] -> [B * count, …]."""
        if self.count == 1:
            return rows
        parts: list[Tensor] = []
        dist.all_gather(parts, rows)
        return paddle.concat(parts)

    def gather_arrays(self, rows: np.ndarray) -> np.ndarray:
        """`gather` of arrays."""
        return rows if self.count == 1 else self.gather(paddle.to_tensor(rows)).numpy()

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this process among those of all: [B * count, …] -> [B, …]."""
        size = rows.shape[0] // self.count
        return rows[self.rank * size : (self.rank + 1) * size]

    def add_gradients(self, parameters: Iterable[Tensor], complete: Tensor) -> None:
        """Sums each parameter's gradient over the processes, in place.

        Args:
            parameters: parameters of one dtype; those without a gradient are left out.
            complete: the one whose gradient is that of the whole batch on every process already: it is averaged.
        """
        if self.count == 1:
            return
        if complete.grad is not None:
            complete.grad.set_value(complete.grad / self.count)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        small = [gradient for gradient in gradients if gradient.size < _LARGE]
        for gradient in gradients:
            if gradient.size >= _LARGE:
                whole = gradient.contiguous()
                dist.all_reduce(whole)
                if whole is not gradient:  # some have strides, which cannot be sent
                    gradient.set_value(whole)
        if small:
            flat = paddle.concat([gradient.flatten() for gradient in small])
            dist.all_reduce(flat)
            for gradient, part in zip(small, flat.split([gradient.size for gradient in small])):
                gradient.set_value(part.reshape(gradient.shape))

    def make_alike(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the values of the first one's tensors."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def tell(self, text: str) -> list[str]:
        """The texts of all processes."""
        if self.count == 1:
            return [text]
        line = text.encode("utf-8", "backslashreplace")
        longest = int(self.gather(paddle.to_tensor([len(line)])).max())
        if not longest:  # which is so before every step
            return [""] * self.count
        row = np.frombuffer(line.ljust(longest, b"\0"), np.uint8)
        return [told.tobytes().rstrip(b"\0").decode() for told in self.gather(paddle.to_tensor(row[None])).numpy()]

    def together(self, work: Callable[[], Result]) -> Result:
        """Does work that may fail on one process alone; then all of them stop, with the same message.

        Raises:
            OSError, ValueError: what the work raised here, or with its message what it raised elsewhere; or that the
                launcher of a process has died. Nobody would stop the processes then, and a second training may run.
        """
        if self.count == 1:
            return work()
        failure = None
        try:
            if self.launcher not in (None, os.getppid()):
                raise ChildProcessError(LAUNCHER_DIED)
            result = work()
        except (OSError, ValueError) as error:
            failure = error
        messages = self.tell("" if failure is None else str(failure) or type(failure).__name__)
        first = next(filter(None, messages), None)
        if failure and messages[self.rank] == first:
            raise failure
        if first:
            raise ValueError(first)
        return result

    def first(self, work: Callable[[], None]) -> None:
        """Does work on the first process alone, while the others wait; see `together`."""
        self.together(work if self.rank == 0 else lambda: None)


def join() -> Ranks:
    """The processes that a launcher such as `paddle.distributed.launch` started, or this one alone.

    They are connected where they are not yet: by gloo on CPUs, by NCCL on GPUs.
    """
    if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) > 1 and not dist.is_initialized():
        dist.init_parallel_env()
    launcher = STARTED_BY if "PADDLE_LOCAL_RANK" in os.environ else None  # which Paddle's launcher sets
    return Ranks(dist.get_rank(), dist.get_world_size(), launcher)


def slice_of(place: int, rank: int, size: int, count: int) -> int:
    """The place in the order of all processes of what stands at a place in the order of one.

    A batch of all is `count` times `size` samples, of which each process takes `size` side by side.
    """
    batch, within = divmod(place, size)
    return (batch * count + rank) * size + within
