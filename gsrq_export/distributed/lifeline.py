"""Tells every process when one of them has failed or died, whatever the others are doing at that moment.

Each process keeps one TCP connection to rank 0, on which nothing is sent. The kernel closes it when the process ends,
however it ends, and its keepalive probes find a machine that is gone; both without the help of a process that may be
busy for hours. Whoever is told prints why and leaves at once: stages are made to be killed (stages/engine.py).
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gsrq_export.errors import GsrqError

EXIT = 3  # status of a process that stops because another one failed
JOINING = 120.0  # seconds for all to connect, after they met
KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a dead machine is found in 40 s
MOST_BYTES = 1 << 16  # of a message
MEND = "start the same command again; it goes on from what is done"


@dataclass
class _Peer:
    connection: socket.socket
    name: str
    buffer: bytes = b""
    finished: bool = False

    def messages(self) -> list[dict[str, Any]] | None:
        """What has come; None at the end of the connection."""
        try:
            data = self.connection.recv(4096)
        except OSError:
            return None
        if not data or len(self.buffer) > MOST_BYTES:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, **message: object) -> None:
        with suppress(OSError):  # gone as well
            self.connection.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class Lifeline:
    """The connections of one process.

    Args:
        rank, size: of this process.
        publish, look_up: a value for, and of, all processes by name; ``look_up`` waits for it.
    """

    rank: int
    size: int
    publish: Callable[[str, str], None]
    look_up: Callable[[str], str]
    _peers: dict[int, _Peer] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _ended: bool = False

    def start(self) -> None:
        """Connect, and watch from now on.

        Raises:
            GsrqError: rank 0 cannot be reached, or some process did not come.
        """
        if self.rank == 0:
            self._serve()
        else:
            self._connect()
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def fail(self, why: str) -> None:
        """Tell the others that this process fails, and why."""
        self._end(f"{_name(self.rank)} failed: {why}")

    def finish(self) -> None:
        """This process is done: its end is no failure. Rank 0 finishes last."""
        with self._lock:
            self._ended = True
            for peer in self._peers.values():
                peer.send(finished=True)

    def _serve(self) -> None:
        token = secrets.token_hex(16)
        with socket.create_server(("", 0)) as server:
            where = {"host": socket.gethostname(), "port": server.getsockname()[1], "token": token}
            self.publish("lifeline", json.dumps(where))
            deadline = time.monotonic() + JOINING
            while len(self._peers) < self.size - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    self._welcome(server.accept()[0], token)
                except TimeoutError:
                    missing = sorted(set(range(1, self.size)) - set(self._peers))
                    raise GsrqError(
                        f"ranks {missing} did not connect to rank 0 on {where['host']} within {JOINING:.0f} s",
                        "let the nodes reach one another over TCP on every port",
                    ) from None

    def _welcome(self, connection: socket.socket, token: str) -> None:
        connection.settimeout(10)
        peer = _Peer(connection, "")
        try:
            hello = (peer.messages() or [{}])[0]
        except ValueError:
            hello = {}
        if not isinstance(hello, dict) or not secrets.compare_digest(str(hello.get("token")), token):
            connection.close()  # a stranger
            return
        peer.name = str(hello["name"])
        _keep(connection)
        self._peers[int(hello["rank"])] = peer

    def _connect(self) -> None:
        where = json.loads(self.look_up("lifeline"))
        hosts = dict.fromkeys([where["host"], os.environ.get("MASTER_ADDR", where["host"])])
        if where["host"] == socket.gethostname():
            hosts = {"127.0.0.1": None, **hosts}
        for host in hosts:
            try:
                connection = socket.create_connection((host, where["port"]), timeout=JOINING / 4)
                break
            except OSError as error:
                reason = error
        else:
            raise GsrqError(
                f"{_name(self.rank)} cannot reach rank 0 at {', '.join(hosts)}, port {where['port']}: {reason}",
                "let the nodes reach one another over TCP on every port",
            )
        peer = _Peer(connection, "rank 0")
        peer.send(token=where["token"], rank=self.rank, name=_name(self.rank))
        _keep(connection)
        self._peers[0] = peer

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = self._peers[key.data]
                    messages = peer.messages()
                    for message in messages or []:
                        if "stop" in message:
                            self._stop(str(message["stop"]))
                        peer.finished |= bool(message.get("finished"))
                    if messages is None:
                        selector.unregister(peer.connection)
                        if not peer.finished:
                            self._stop(
                                f"{peer.name} ended without a word: killed, out of memory, or its machine is gone"
                            )

    def _stop(self, why: str) -> None:
        """Leave, and make the others leave; nothing where this process has ended or failed by itself."""
        with self._lock:
            if not self._ended:
                self._end(why)
                print(f"error: rank {self.rank} stops: {why}\n  mend: {MEND}", file=sys.stderr, flush=True)
                os._exit(EXIT)

    def _end(self, why: str) -> None:
        with self._lock:
            if not self._ended:
                self._ended = True
                for peer in self._peers.values():
                    peer.send(stop=why)


def _name(rank: int) -> str:
    return f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"


def _keep(connection: socket.socket) -> None:
    """No time limit, but probes of an idle connection."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
