"""Functions run on several ranks over gloo, phase after phase: one interpreter that forks the ranks of each.

``python -m tests.coca.rank_processes MODULE PHASES ARGUMENTS``: PHASES is a JSON list of [function, number of ranks],
0 for one process without torch.distributed; each function gets ARGUMENTS, a JSON list.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def run_phases(module: str, phases: list[tuple[str, int]], *arguments: object) -> str:
    """What the ranks printed on stderr; fails where one of them has."""
    command = [sys.executable, "-m", __name__, module, json.dumps(phases), json.dumps(arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _rank(function: str, rank: int, world: int, meeting: str, arguments: list[object], module: str) -> None:
    torch.set_num_threads(1)
    if world:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world)
    getattr(importlib.import_module(module), function)(*arguments)
    if world:
        dist.destroy_process_group()


def _main() -> int:
    module, phases, arguments = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    importlib.import_module(module)
    importlib.import_module("torch._dynamo")  # else each rank of FSDP imports it by itself
    for function, world in phases:
        with tempfile.TemporaryDirectory() as meeting:
            children = []
            for rank in range(max(world, 1)):
                child = os.fork()
                if child == 0:
                    try:
                        _rank(function, rank, world, meeting, arguments, module)
                        os._exit(0)
                    except BaseException:
                        traceback.print_exc()
                        sys.stderr.flush()
                        os._exit(1)
                children.append(child)
            if any(os.waitpid(child, 0)[1] for child in children):
                print(f"{function} on {world} ranks failed", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
