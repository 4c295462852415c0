"""Starts workers as a plain launcher would: it sets torch's environment variables and watches over nobody.

Reads a JSON list of runs {"size": N, "arguments": [...]} and prints what became of each. Workers are forked from this
process, which has imported all they need, so a run takes a second.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from typing import Any

import torch
import worker
from transformers import LlamaForCausalLM  # noqa: F401  imported once, for all

LONGEST = 60.0  # seconds of a run; then its processes are killed and the run counts as hung


def start(rank: int, size: int, port: int, arguments: list[str], output: int) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    status = 1
    try:
        if arguments[0] == "gsrq":
            from gsrq_export.commands.app import main

            sys.argv = arguments
            main()
        else:
            status = worker.main(arguments)
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(size: int, arguments: list[str]) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryFile() as output:
        children = {start(rank, size, port, arguments, output.fileno()): rank for rank in range(size)}
        began, statuses, ended = time.monotonic(), [None] * size, {}
        while len(ended) < size and time.monotonic() - began < LONGEST:
            for child in [c for c in children if c not in ended]:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ended[child] = time.monotonic()
                    statuses[children[child]] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for child in [c for c in children if c not in ended]:
            os.kill(child, 9)
            os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    spread = max(ended.values(), default=0.0) - min(ended.values(), default=0.0)
    return {"statuses": statuses, "seconds": time.monotonic() - began, "first_to_last": spread, "output": text}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.load(sys.stdin)
    if any("--stages" in one["arguments"] for one in given):
        import gsrq_export.commands.app  # noqa: F401  with ONNX, which not every test needs
    print(json.dumps([run(one["size"], one["arguments"]) for one in given]))
