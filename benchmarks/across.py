"""The decoder where it is meant to be: the records on one node, the trainer's rank on another.

    python -m benchmarks.across [--quick] [--repeat N]

Prints one JSON line a shape. Two raylets of this machine stand for two nodes, so what crosses
between them is copied through a socket, not a network. ``whole`` is the batch of which ``rank``
wants a quarter of the layers and half of each sequence; the decoder beside the records cuts it
out. Each is asked for as stored and as int64, with the client's own choice of where.
"""

import argparse
from typing import Any

from benchmarks.decode import EXPERTS, GRID, QUICK_SHAPES, SHAPES
from benchmarks.harness.cluster import own_nodes, serve_decoder, start
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.measuring import Path, Target, Times, interleaved
from benchmarks.harness.rollouts import RolloutEngine, Rollouts, Shape

APP, ENGINES = "across", "engines"
HOW: dict[str, dict[str, Any]] = {"whole": {}, "rank": {"rank": GRID}}
TARGETS = (
    Target("rank_vs_whole", "rank", "whole", most=0.5),
    Target("rank_int64_vs_whole", "rank_int64", "whole_int64", most=0.5),
)


def line(shape: Shape, repeat: int) -> dict[str, Any]:
    """One rank's slice, beside the whole batch."""
    rollouts = Rollouts.put(APP, shape, start(RolloutEngine, shape, EXPERTS, on=ENGINES))
    whole, rank = (rollouts.read(**how)(None).ids.nbytes for how in HOW.values())
    times: dict[str, Times] = {}
    for wide, dtype, times_the_bytes in (("", {}, 2), ("_int64", {"dtype": "int64"}, 8)):
        paths = [Path(name + wide, rollouts.read(**how, **dtype)) for name, how in HOW.items()]
        times |= interleaved(paths, repeat, touched_bytes=times_the_bytes * whole)
    rollouts.release()
    return {
        "shape": str(shape),
        "bytes": {"whole": whole, "rank": rank},
        "ms": {name: found.summary() for name, found in times.items()},
        "targets": {target.name: target.judge(times) for target in TARGETS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the decoder between two nodes.")
    parser.add_argument("--shapes", help=f"countxrowsxlayersxtop_k,...; default {SHAPES}")
    parser.add_argument("--repeat", type=int, help="rounds; default 9, quick 3")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    options = parser.parse_args()
    repeat = options.repeat or (3 if options.quick else 9)
    about = {"benchmark": "across", "machine": describe(), "versions": versions()}
    with own_nodes(ENGINES, object_store_bytes=3 << 30):
        serve_decoder(APP, replicas=2)
        for shape in (options.shapes or (QUICK_SHAPES if options.quick else SHAPES)).split(","):
            emit({**about, "repeat": repeat, **line(Shape.parse(shape), repeat)})


if __name__ == "__main__":
    main()
