"""Engine groups on pretended GPUs: members lost at random moments, and many steps.

    python -m benchmarks.groups [--faults 10] [--steps 10000] [--only faults|steps] [--seed 0]

Groups of two workers over two nodes, tensor parallel and data with expert parallel; the engine,
its executor and Ray are real, the arithmetic is the CPU's. ``faults``: so many members are killed,
then stopped (SIGSTOP), each at a random moment under load; every promise is asserted
(`tests/lmdeploy/served/group_faults`) and each loss is a line with the seconds until all rollouts
had ended and until a new group sampled the same again. ``steps``: so many decoding steps, and the
bytes in the object stores before and after.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.lines import emit, only_lines
from examples.tiny_moe import write_checkpoint
from serve_app import RoutedExpertsClient
from serve_app.types import GenerateRequest
from tests.lmdeploy.served.graphs import remove, served
from tests.lmdeploy.served.group_faults import kill, lose_a_member, stop
from tests.lmdeploy.served.pretended_gpus import TWO_NODES, pretended_gpus, shared_memory_used

KINDS: dict[str, dict[str, int]] = {"tp": {"tp": 2}, "ep": {"dp": 2, "ep": 2}}
CONTEXT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description="Lose members of groups; step many times.")
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", choices=["faults", "steps"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as path, only_lines(), pretended_gpus():
        write_checkpoint(Path(path), hidden=32, layers=3, experts=16, top_k=2)
        for kind, sizes in KINDS.items():
            limits: dict[str, Any] = {"liveness_timeout_s": 3.0, **sizes}
            room: dict[str, Any] = {"context_length": CONTEXT, "max_batch_size": 16}
            client = served(kind, Path(path), bundles=TWO_NODES, **room, **limits)
            if options.only != "steps":
                for harm in (kill, stop):
                    for number in range(options.faults):
                        took = lose_a_member(client, kind, harm, dice)
                        line = {"group": kind, "harm": harm.__name__, "number": number, **took}
                        emit({"benchmark": "groups", **line})
            if options.only != "faults":
                emit({"benchmark": "groups", "group": kind, **many_steps(client, options.steps)})
            remove(kind)


def many_steps(client: RoutedExpertsClient, steps: int) -> dict[str, Any]:
    """Decode for so many steps; return the bytes in all object stores before, between and after."""
    used, done = [shared_memory_used()], 0
    while done < steps:
        new = min(steps - done, CONTEXT - 8)
        result = client.generate(
            GenerateRequest(
                input_ids=[5, 6, 7],
                max_new_tokens=new,
                temperature=0,
                ignore_eos=True,
                return_routed_experts=True,
            )
        )
        assert len(result.output_ids) == new
        client.release([str(result.routed_experts)])
        done += new
        used.append(shared_memory_used())
    return {"steps": done, "object_store_bytes": used}


if __name__ == "__main__":
    main()
