"""Which rows of the padded batch one trainer rank gets, and from which sequence each comes.

One fixed order, so that every rank computes the same: pad each sequence to a multiple, pad the
total, split over context parallel ranks, pad the rank's rows, split over sequence parallel ranks.
Gathered over all ranks in the same order, the pieces are the whole padded batch.

Zigzag is Megatron's load balancing for causal attention: each padded sequence (or, as
``zigzag_buffer``, all of them as one) is cut into 2·cp chunks, and rank r takes chunk r and,
counted from the end, chunk r again.

Rows are numbered for `serve_app.assemble.padding`, which deals experts out by number. Rows of
padding count up from 0 over the whole padded batch. Rows of sequences count down: the last row of
the first is -1, that of the second -2, and so on, since a sequence's last row is often the one
that was never captured; those before it follow downwards. So the rows that are usually filled have
numbers in one stretch, whatever their places, and no rank needs to know what others found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from serve_app.types import BatchSpec, RankSlice

Range = tuple[int, int]


class Piece(NamedTuple):
    """``count`` rows from row ``first`` of a sequence on; of padding where it is None.

    ``at`` is the number of the first of them, see above.
    """

    sequence: int | None
    first: int
    count: int  # type: ignore[assignment]  # a tuple's own count is of no use here
    at: int


@dataclass(frozen=True)
class RankRows:
    """A rank's rows in order, and the global padded boundaries.

    They are ``[sequences + 1]``, and one more where the total's padding is a sequence of its own.
    ``padded`` is the number of sequences that share the rows evenly, in the padded layout.
    """

    pieces: list[Piece]
    boundaries: list[int]
    padded: int | None = None

    @cached_property
    def rows(self) -> int:
        """How many rows the rank gets."""
        return sum(piece.count for piece in self.pieces)

    @property
    def lead(self) -> tuple[int, ...]:
        """The rows' part of the batch's shape: ``[rows]`` or ``[sequences, length]``."""
        return (self.rows,) if self.padded is None else (self.padded, self.rows // self.padded)

    def placed(self) -> Iterator[tuple[slice, Piece]]:
        """Yield each piece with the rank's rows that it is."""
        stop = 0
        for piece in self.pieces:
            yield slice(stop, stop := stop + piece.count), piece


def rank_rows(lengths: Sequence[int], spec: BatchSpec) -> RankRows:
    """Return a rank's rows of a batch of sequences of these lengths."""
    lay_out = padded_rows if spec.layout == "padded" else packed_rows
    return lay_out(lengths, spec.rank)


def packed_rows(lengths: Sequence[int], rank: RankSlice) -> RankRows:
    """Lay sequences out one after the other (varlen) and cut a rank's part out.

    Raises ValueError when a split does not come out even; the multiples are there to see to it.
    """
    padded = [_up(length, rank.seq_multiple) for length in lengths]
    surplus = _up(sum(padded), rank.total_multiple) - sum(padded)
    if surplus and rank.tail == "last_sequence":
        padded[-1] += surplus
    elif surplus and rank.tail == "own_sequence":
        padded.append(surplus)
    boundaries = [0, *accumulate(padded)]
    ranges = _context_parallel(boundaries, rank)
    if rank.tail == "rank":
        # Every rank has as many rows, so all of them together pad one more sequence.
        count = sum(end - begin for begin, end in ranges)
        if surplus := _up(count, rank.total_multiple) - count:
            begin = boundaries[-1] + rank.cp_rank * surplus
            ranges.append((begin, begin + surplus))
            boundaries.append(boundaries[-1] + rank.cp_size * surplus)
    return RankRows(_pieces(_sequence_parallel(ranges, rank), lengths, boundaries), boundaries)


def padded_rows(lengths: Sequence[int], rank: RankSlice) -> RankRows:
    """Right-pad every sequence to the longest one's multiple; a rank gets its part of each."""
    if rank.total_multiple > 1:
        raise ValueError(
            "the padded layout has no total to pad: expected seq_multiple and total_multiple=1,"
            f" got {rank}"
        )
    longest = _up(max(lengths), rank.seq_multiple)
    boundaries = [longest * index for index in range(len(lengths) + 1)]
    ranges: list[Range] = []
    for sequence in pairwise(boundaries):
        ranges += _sequence_parallel(_context_parallel(sequence, rank), rank)
    return RankRows(_pieces(ranges, lengths, boundaries), boundaries, len(lengths))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _context_parallel(boundaries: Sequence[int], rank: RankSlice) -> list[Range]:
    low, high, size, index = boundaries[0], boundaries[-1], rank.cp_size, rank.cp_rank
    if size == 1:
        return [(low, high)]
    if rank.cp == "contiguous":
        share = _share(high - low, size, "rows of the padded batch", "cp_size")
        return [(low + index * share, low + (index + 1) * share)]
    ranges: list[Range] = []
    buffer = rank.cp == "zigzag_buffer"
    what = "rows of the padded batch" if buffer else "rows of a padded sequence"
    for begin, end in [(low, high)] if buffer else pairwise(boundaries):
        chunk = _share(end - begin, 2 * size, what, "2 * cp_size")
        first, last = begin + index * chunk, end - index * chunk
        ranges += ((first, first + chunk), (last - chunk, last))
    return ranges


def _sequence_parallel(ranges: list[Range], rank: RankSlice) -> list[Range]:
    count = sum(end - begin for begin, end in ranges)
    share = _share(count, rank.sp_size, "rows of the rank", "sp_size")
    if rank.sp_size == 1:
        return ranges
    first, stop = rank.sp_rank * share, (rank.sp_rank + 1) * share
    kept: list[Range] = []
    at = 0
    for begin, end in ranges:
        low, high = max(first, at), min(stop, at + end - begin)
        if low < high:
            kept.append((begin + low - at, begin + high - at))
        at += end - begin
    return kept


def _share(count: int, parts: int, what: str, by: str) -> int:
    if count % parts:
        raise ValueError(
            f"{count} {what} do not divide by {by} = {parts}; raise seq_multiple or total_multiple"
        )
    return count // parts


def _pieces(ranges: list[Range], lengths: Sequence[int], boundaries: list[int]) -> list[Piece]:
    """Cut ascending ranges of padded rows where sequences and their padding begin."""
    pieces: list[Piece] = []
    index, count = 0, len(lengths)
    real = 0
    for at, end in ranges:
        while at < end:
            while index < count and boundaries[index + 1] <= at:
                real += lengths[index]
                index += 1
            if index == count:
                pieces.append(Piece(None, 0, end - at, at - real))
                break
            begin, stop = boundaries[index], min(end, boundaries[index + 1])
            length = lengths[index]
            if (first := at - begin) < length:
                stop = min(stop, begin + length)
                pieces.append(Piece(index, first, stop - at, first - length - index))
            else:
                pieces.append(Piece(None, 0, stop - at, at - real - length))
            at = stop
    return pieces
