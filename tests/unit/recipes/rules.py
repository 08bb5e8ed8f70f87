"""How trainers pad and split a micro-batch, restated on numbered rows; `PAD` is no row at all.

Each rule takes the sequences' rows and a rank's place, and gives the rank's rows and the padded
boundaries, or None where the trainer has none.
"""

from itertools import accumulate
from math import lcm
from typing import Any

import numpy as np

from examples.recipes.slices import Place

Rows = np.ndarray[Any, np.dtype[np.int64]]
Given = list[Rows]
Got = tuple[Rows, list[int] | None]
PAD = -1


def longer(rows: Rows, by: int) -> Rows:
    return np.concatenate([rows, np.full(by, PAD)])


def upto(rows: Rows, multiple: int) -> Rows:
    """Pad to the next multiple."""
    return longer(rows, -len(rows) % multiple)


def two_chunks(rows: Rows, place: Place) -> Rows:
    """Give rank r its r-th chunk from the front and its r-th from the back."""
    if place.cp_size == 1:
        return rows
    half, mine = len(rows) // place.cp_size // 2, place.cp_rank
    back = len(rows) - half * (mine + 1)
    return np.concatenate([rows[half * mine : half * (mine + 1)], rows[back : back + half]])


def scattered(rows: Rows, place: Place) -> Rows:
    """Split over the tensor parallel ranks where sequence parallelism is on."""
    return rows.reshape(place.tp_size, -1)[place.tp_rank] if place.sequence_parallel else rows


def boundaries(parts: Given) -> list[int]:
    return [0, *accumulate(len(part) for part in parts)]


def zigzag(parts: Given, place: Place) -> Got:
    """Cut each padded sequence by itself."""
    mine = np.concatenate([two_chunks(part, place) for part in parts])
    return scattered(mine, place), boundaries(parts)


def last_longer(parts: Given, multiple: int) -> Given:
    """Let the last sequence take what the total lacks."""
    return [*parts[:-1], longer(parts[-1], -sum(map(len, parts)) % multiple)]


def _verl_align(place: Place) -> int:
    return place.tp_size * place.cp_size * 2 if place.cp_size > 1 else place.tp_size


def verl(given: Given, place: Place) -> Got:
    return zigzag([upto(rows, _verl_align(place)) for rows in given], place)


def verl_fp8(given: Given, place: Place) -> Got:
    align = _verl_align(place)
    parts = [upto(rows, lcm(16, align)) for rows in given]
    return zigzag(last_longer(parts, align * 128), place)


def verl_buckets(given: Given, place: Place, bucket: int) -> Got:
    parts = [upto(rows, _verl_align(place)) for rows in given]
    return zigzag(last_longer(parts, lcm(bucket, place.cp_size)), place)


def verl_contiguous(given: Given, place: Place, window: int) -> Got:
    parts = [upto(rows, place.tp_size * place.cp_size) for rows in given]
    short = place.cp_size * window - sum(map(len, parts))
    parts[-1] = longer(parts[-1], max(0, short))
    mine = np.concatenate(parts).reshape(place.cp_size, -1)[place.cp_rank]
    return scattered(mine, place), boundaries(parts)


def slime(given: Given, place: Place, multiplier: int) -> Got:
    """Zigzag by chunks rounded up; then the rank's own rows are padded, and all count times cp."""
    parts = []
    for rows in given:
        chunk = -(-len(rows) // (2 * place.cp_size))
        whole = longer(rows, 2 * place.cp_size * chunk - len(rows)) if place.cp_size > 1 else rows
        parts.append(two_chunks(whole, place))
    if pad := -sum(map(len, parts)) % (place.tp_size * multiplier):
        parts.append(np.full(pad, PAD))
    ends = [place.cp_size * end for end in boundaries(parts)]
    return scattered(np.concatenate(parts), place), ends


def slime_allgather(given: Given, place: Place, multiplier: int) -> Got:
    """Concatenate first, pad the whole stream, and cut it once."""
    pad = -sum(map(len, given)) % (place.cp_size * place.tp_size * multiplier)
    parts = [*given, np.full(pad, PAD)] if pad else given
    mine = np.split(np.concatenate(parts), place.cp_size)[place.cp_rank]
    return scattered(mine, place), boundaries(parts)


def skyrl(given: Given, place: Place, fp8: bool) -> Got:
    align = _verl_align(place)
    align = lcm(align, 16 * place.cp_size) if fp8 else align
    return zigzag([upto(rows, align) for rows in given], place)


def skyrl_once(given: Given, place: Place, tokens: int) -> Got:
    cp = place.cp_size
    parts = [upto(rows, place.tp_size * cp * 2) if cp > 1 else rows for rows in given]
    return zigzag(last_longer(parts, lcm(_verl_align(place), tokens)), place)


def nemo_rl(given: Given, place: Place, divisor: int, packed_to: int | None) -> Got:
    split = 1
    if place.cp_size > 1:
        split *= place.cp_size * 2
    if place.tp_size > 1 and place.sequence_parallel:
        split *= place.tp_size
    total = divisor * split if divisor > 1 else 1
    parts = [upto(rows, split) for rows in given]
    if packed_to is None:
        return zigzag(last_longer(parts, total), place)
    wanted = -(-packed_to // total) * total
    parts[-1] = longer(parts[-1], wanted - sum(map(len, parts)))
    return zigzag(parts, place)


def whole_buffer(given: Given, place: Place, rows: int) -> Got:
    """Megatron's zigzag knows no sequences here: one buffer, filled up at its end."""
    buffer = np.concatenate(given)
    return scattered(two_chunks(longer(buffer, rows - len(buffer)), place), place), None


def fixed_length(given: Given, place: Place, rows: int) -> Got:
    """``[b, s]``: every sequence as long, each cut by itself."""
    each = [longer(one, rows - len(one)) for one in given]
    mine = [scattered(two_chunks(one, place), place) for one in each]
    return np.concatenate(mine), boundaries(each)


def packed_to(given: Given, place: Place, rows: int) -> Got:
    """xtuner: padding fills the pack, sequence parallel ranks take shares of it."""
    pack = longer(np.concatenate(given), rows - sum(map(len, given)))
    return scattered(pack, place), None


def prime_rl(given: Given, place: Place, multiple: int) -> Got:
    return np.split(upto(np.concatenate(given), multiple), place.cp_size)[place.cp_rank], None
