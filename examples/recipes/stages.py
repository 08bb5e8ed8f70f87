"""Which layers a pipeline stage has, as Megatron hands them out: the ``layers`` of a `RankSlice`.

Layers go to the stages in order: those of all pipeline ranks' first virtual stage, then of their
second. A stage may have none (embedding, loss or MTP only): ``layers=()``.
"""

import re
from collections.abc import Sequence

Stages = list[list[tuple[int, ...]]]
"""Global layers by pipeline rank and virtual stage."""


def stages(
    layers: int,
    pp: int,
    vp: int = 1,
    *,
    first: int | None = None,
    last: int | None = None,
    embedding: bool = False,
    loss: bool = False,
) -> Stages:
    """Split ``layers`` over ``pp`` ranks of ``vp`` virtual stages each.

    ``first`` and ``last`` are ``num_layers_in_first_pipeline_stage`` and ``…_last_…``: a rank's,
    all its virtual stages together. ``embedding`` and ``loss`` count as a layer of the stage
    that has them (``account_for_…_in_pipeline_split``).
    """
    if (embedding or loss) and (first is not None or last is not None):
        raise ValueError("embedding and loss count where all ranks have as many, got first or last")
    given = {rank: count for rank, count in ((0, first), (pp - 1, last)) if count is not None}
    left, others = layers + embedding + loss - sum(given.values()), pp - len(given)
    if left < 0 or (left % others if others else left):
        raise ValueError(f"{left} of {layers} layers do not divide over {others} of {pp} ranks")
    each = [given.get(rank, left // others if others else 0) for rank in range(pp)]
    if uneven := [count for count in each if count % vp]:
        raise ValueError(f"{uneven[0]} layers of a rank do not divide over {vp} virtual stages")
    counts = [count // vp for _ in range(vp) for count in each]
    counts[0] -= embedding
    counts[-1] -= loss
    return _handed_out(counts, pp)


def laid_out(layout: str, pp: int) -> Stages:
    """Read a ``pipeline_model_parallel_layout`` such as ``"Et*3|(tt|)*29,m|L"``.

    A ``t`` is a decoder layer; E, m and L (embedding, MTP, loss) have no routes to replay.
    """
    text = layout.replace(",", "")
    for repeated in (r"\(([^()]*)\)\*(\d+)", r"(\w)\*(\d+)"):
        text = re.sub(repeated, lambda found: found[1] * int(found[2]), text)
    if wrong := re.search(r"[^EtmL|]", text):
        raise ValueError(f"expected stages of E, t, m and L in {layout!r}, got {wrong[0]!r}")
    counts = [stage.count("t") for stage in text.split("|")]
    if len(counts) % pp:
        raise ValueError(f"{len(counts)} stages of {layout!r} do not divide over {pp} ranks")
    return _handed_out(counts, pp)


def _handed_out(counts: Sequence[int], pp: int) -> Stages:
    ranks: Stages = [[] for _ in range(pp)]
    begin = 0
    for number, count in enumerate(counts):
        ranks[number % pp].append(tuple(range(begin, begin + count)))
        begin += count
    return ranks
