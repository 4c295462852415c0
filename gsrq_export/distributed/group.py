"""The processes that torchrun started: its rendezvous store for small things, a process group for tensors."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gsrq_export.distributed.lifeline import MEND, Lifeline
from gsrq_export.distributed.world import ALONE, World
from gsrq_export.errors import GsrqError

if TYPE_CHECKING:
    from gsrq_export.stages.progress import Task

CONTRACT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, and other launchers of torch
MEETING = timedelta(minutes=10)  # for all processes to start
EXCHANGE = timedelta(minutes=30)  # for one exchange of tensors; a process that died is found long before
BLAME = 10.0  # seconds in which the lifeline says who died, where an exchange fails first
POLL = (0.005, 0.25)  # seconds between looks at the store, at first and at most


class Group(World):
    """Many processes.

    Args:
        store: of the rendezvous. It is polled, never waited in: the process group's threads use it too.
        device: where tensors lie that are gathered; with the gloo backend they go through the CPU.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._store = store
        self._steps = 0
        self._counted: tuple[Task, str] | None = None
        self._host = socket.gethostname()

    def meet(self) -> None:
        """Make the process group: nccl where each process has a GPU of its own, else gloo.

        Raises:
            GsrqError: nccl or gloo cannot start.
        """
        places = self.exchange([self._host, str(self.device)])
        alone = self.device.type == "cuda" and len({tuple(place) for place in places}) == self.size
        if alone:
            torch.cuda.set_device(self.device)
        self.backend = "nccl" if alone else "gloo"
        try:
            dist.init_process_group(
                self.backend,
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=EXCHANGE,
            )
        except (RuntimeError, ValueError) as error:
            raise GsrqError(
                f"rank {self.rank} on {self._host}: {self.backend} does not start: {error}",
                "see docs/distributed.md on networks (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
            ) from error

    def claim(self, count: int) -> Iterator[int]:
        key = self._key("claim")
        while (job := self._ask(lambda: self._store.add(key, 1)) - 1) < count:
            yield job

    def tell(self, value: Any) -> Any:
        key = self._key("tell")
        if self.rank == 0:
            self._set(key, json.dumps(value))
        return json.loads(self._get(key))

    def barrier(self) -> None:
        self.exchange(None)

    def exchange(self, value: Any) -> list[Any]:
        """What every process gave, plain data, in order of ranks."""
        key = self._key("exchange")
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self._set(keys[self.rank], json.dumps(value))
        self._until(keys)
        self._counted = None
        return [json.loads(self._get(name)) for name in keys]

    @contextmanager
    def first(self) -> Iterator[None]:
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        given = tensor.contiguous()
        if self.backend == "gloo":
            given = given.cpu()
        found = given.new_empty((self.size, *given.shape))
        try:
            dist.all_gather(list(found.unbind(0)), given)
        except RuntimeError as error:
            raise self._lost(f"could not exchange tensors by {self.backend}: {error}") from error
        return found.to(tensor.device)

    def progress(self, task: Task) -> Callable[[int], None]:
        key = self._key("progress")
        if self.rank == 0:
            self._counted = (task, key)

        def advance(count: int = 1) -> None:
            done = self._ask(lambda: self._store.add(key, count))
            if self.rank == 0:
                task.update(done)

        return advance

    def agree(self, facts: Mapping[str, object]) -> None:
        said = self.tell({"host": self._host, "facts": facts})
        for name, expected in said["facts"].items():
            mine = json.loads(json.dumps(facts.get(name)))
            if mine != expected:
                raise GsrqError(
                    f"{name} of rank {self.rank} on {self._host} is {mine}, of rank 0 on {said['host']} {expected}",
                    "give all processes the same model, recipe, installation and kind of device",
                )
        self.barrier()

    def publish(self, name: str, value: str) -> None:
        self._set(f"named/{name}", value)

    def look_up(self, name: str) -> str:
        return self._get(f"named/{name}")

    def _key(self, what: str) -> str:
        """Of a step that all processes take; as they take the same ones, they make the same keys."""
        self._steps += 1
        return f"{self._steps}/{what}"

    def _set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def _get(self, key: str) -> str:
        self._until([key])
        return bytes(self._ask(lambda: self._store.get(key))).decode()

    def _until(self, keys: Sequence[str]) -> None:
        pause = POLL[0]
        while not self._ask(lambda: self._store.check(list(keys))):
            time.sleep(pause)
            pause = min(1.2 * pause, POLL[1])
            if self._counted:
                task, key = self._counted
                task.update(self._ask(lambda key=key: self._store.add(key, 0)))  # type: ignore[misc]

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise self._lost(f"lost the launcher's store: {error}") from error

    def _lost(self, what: str) -> GsrqError:
        """The error of an exchange that failed; mostly the lifeline knows better, and ends this process meanwhile."""
        time.sleep(BLAME)
        return GsrqError(f"rank {self.rank} on {self._host} {what}", f"see docs/distributed.md; {MEND}")


def launched() -> bool:
    """Whether a launcher of several processes started this one."""
    return all(os.environ.get(name) for name in CONTRACT) and int(os.environ["WORLD_SIZE"]) > 1


def local_device(device: str) -> str:
    """The device of this process: ``cuda`` is that of its place on its machine, all else is as given.

    Raises:
        GsrqError: more processes than GPUs.
    """
    if device != "cuda" or not launched():
        return device
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= count:
        started = os.environ.get("LOCAL_WORLD_SIZE", place + 1)
        raise GsrqError(
            f"--device cuda: {started} processes on {socket.gethostname()}, torch sees {count} CUDA devices",
            "start as many processes as GPUs (--nproc-per-node), or let them share one: --device cuda:0",
        )
    return f"cuda:{place}"


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that the launcher started, this one among them; without a launcher this one alone.

    An exception that leaves the block stops all processes.

    Args:
        device: of this process, as ``local_device`` gives it.
    """
    if not launched():
        yield ALONE
        return
    store, rank, size = next(iter(rendezvous("env://", timeout=MEETING)))
    store = PrefixStore("gsrq", store)
    group = Group(store, rank, size, torch.device(device))
    lifeline = Lifeline(rank, size, group.publish, group.look_up)
    lifeline.start()
    try:
        group.meet()
        yield group
    except BaseException as error:
        lifeline.fail(str(error) if isinstance(error, GsrqError) else f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        raise
    lifeline.finish()
    dist.destroy_process_group()
