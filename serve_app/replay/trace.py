"""Proof of replay: for chosen sequences, what was recorded, what came, and what routers used.

A trace is JSONL. The first line names the format; then, for each forward pass, a line that says
what follows, a line a (layer, row), and a line that counts them, or says why the pass ended
early. So a file that is cut off is known as such. Ids stand in the order of where they come from.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import nn

from serve_app.assemble.ranks import rank_rows
from serve_app.engines.moe import MoeBlock
from serve_app.errors import ReplayError
from serve_app.replay.forcing import columns_by_layer
from serve_app.replay.verdict import FORMAT, TraceVerdict, check_trace
from serve_app.types import BatchSpec, ExpertBatch, RoutedSequence


class Recorded(Protocol):
    """A record as ``client.get(key)`` returns it."""

    @property
    def ids(self) -> npt.NDArray[Any]:
        """``[rows, layers, top_k]``."""

    @property
    def start(self) -> int:
        """Sequence position of the first row."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Global indices of the layers that have experts."""


class _Place(NamedTuple):
    """A row of the batch: whose it is, and its position in the record, None in padding."""

    row: int
    sequence: int
    position: int | None


class Trace:
    """Writes a file, one forward pass after the other; give it to `replay_routing`.

    ``sequences`` are the indices of those to follow, all of them if None. With ``of``, what was
    materialized, and ``get``, how a key is read (``client.get``), the records themselves are
    written beside what the batch has of them. A rank's part of a batch needs ``of`` and its
    ``spec``, to know whose rows it has. In memory are the chosen rows' ids of one layer at a time.

    The file is new, and only its owner may read it. Raises `ReplayError` where it exists already,
    where it cannot be written, and for sequences that the batch has not.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sequences: Sequence[int] | None = None,
        *,
        of: Sequence[RoutedSequence] | None = None,
        get: Callable[[str], Recorded] | None = None,
        spec: BatchSpec | None = None,
    ) -> None:
        if get is not None and of is None:
            raise ReplayError("expected the sequences that were materialized, to get their records")
        self.path = Path(path)
        self._sequences = sequences
        self._of = of
        self._get = get
        self._spec = spec or BatchSpec()
        self._passes = 0

    def verdict(self) -> TraceVerdict:
        """Say whether replay happened in all passes so far; see `check_trace`."""
        return check_trace(self.path)

    @contextmanager
    def of(self, batch: ExpertBatch, blocks: Sequence[MoeBlock]) -> Iterator[None]:
        """Write one forward pass that runs inside; what runs again in backward is not written."""
        places = self._places(batch)
        recorded = self._recorded(places)
        with ExitStack() as stack:
            file = stack.enter_context(self._opened())
            lines = _Lines(file, batch, places, recorded)
            lines.begin(self._passes, [block.layer for block in blocks])
            for block in blocks:
                hook = block.experts.register_forward_pre_hook(
                    partial(lines.read, block), with_kwargs=True
                )
                stack.callback(hook.remove)
            try:
                yield
            except BaseException as error:
                lines.end(f"{type(error).__name__}: {error}")
                raise
            lines.end(None)

    def _opened(self) -> IO[str]:
        """Open the file, which this trace made: nobody's file is overwritten or followed."""
        first = self._passes == 0
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if first else os.O_APPEND)
        try:
            file = os.fdopen(os.open(self.path, flags, 0o600), "w", encoding="utf-8")
        except OSError as error:
            raise ReplayError(f"trace {self.path}: expected a new file, got {error}") from error
        self._passes += 1  # only now is it known to be ours
        if first:
            file.write(json.dumps(FORMAT) + "\n")
        return file

    def _places(self, batch: ExpertBatch) -> list[_Place]:
        rows = len(batch.valid)
        whole = list(batch.cu_seqlens.tolist())
        count = len(whole) - 1 if self._of is None else len(self._of)
        chosen = range(count) if self._sequences is None else self._sequences
        if unknown := [index for index in chosen if not 0 <= index < count]:
            raise ReplayError(f"trace: expected sequences in [0, {count}), got {unknown}")
        if self._of is None:
            if whole[-1] != rows:
                raise ReplayError(
                    f"trace: the batch has {rows} of {whole[-1]} rows: expected of= and spec= as"
                    " they were materialized, to know whose"
                )
            parts = enumerate(pairwise(whole))
            wanted = set(chosen)
            return [
                _Place(row, index, row - begin)
                for index, (begin, end) in parts
                if index in wanted
                for row in range(begin, end)
            ]
        return list(self._rank_places(rows, self._of, set(chosen)))

    def _rank_places(
        self, rows: int, of: Sequence[RoutedSequence], chosen: set[int]
    ) -> Iterator[_Place]:
        """Yield the places that one rank has, by the same arithmetic that gave it its rows."""
        ours = rank_rows([sequence.length for sequence in of], self._spec)
        if ours.rows != rows:
            raise ReplayError(
                f"trace: expected a batch of {ours.rows} rows by of= and spec=, got {rows}"
            )
        for here, piece in ours.placed():
            if piece.sequence is not None and piece.sequence in chosen:
                first = of[piece.sequence].first + piece.first - here.start
                for row in range(here.start, here.stop):
                    yield _Place(row, piece.sequence, first + row)

    def _recorded(self, places: Sequence[_Place]) -> Mapping[int, Recorded]:
        if self._get is None or self._of is None:
            return {}
        keys = {place.sequence: self._of[place.sequence].key for place in places}
        return {index: self._get(key) for index, key in keys.items() if key is not None}


class _Lines:
    """What is written of one forward pass."""

    def __init__(
        self,
        file: IO[str],
        batch: ExpertBatch,
        places: Sequence[_Place],
        recorded: Mapping[int, Recorded],
    ) -> None:
        self._file = file
        self._batch = batch
        self._places = places
        self._recorded = recorded
        self._rows = torch.tensor([place.row for place in places], dtype=torch.long)
        self._valid = self._of_rows(batch.valid)
        self._versions = self._of_rows(batch.weight_version)
        self._columns = columns_by_layer(batch)
        self._seen: set[int] = set()
        self._count = 0

    def begin(self, number: int, layers: Sequence[int]) -> None:
        """Say what follows."""
        self._write({"pass": number, "rows": len(self._places), "layers": list(layers)})

    def end(self, error: str | None) -> None:
        """Say that it was all, or why it was not."""
        self._write({"lines": self._count, "error": error})

    def read(
        self, block: MoeBlock, _: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Write the lines of one layer, of the first time that its experts are called."""
        if block.layer in self._seen:
            return
        self._seen.add(block.layer)
        used = self._of_rows(block.routed_ids(args, kwargs))
        sliced = self._of_rows(self._batch.ids[:, self._columns[block.layer]])
        rows = zip(self._places, self._valid, self._versions, sliced, used, strict=True)
        for place, valid, version, came, chosen in rows:
            self._count += 1
            self._write(
                {
                    "sequence": place.sequence,
                    "row": place.row,
                    "layer": block.layer,
                    "valid": valid,
                    "weight_version": version,
                    "recorded": self._record_of(place, block.layer),
                    "sliced": came,
                    "used": chosen,
                }
            )

    def _record_of(self, place: _Place, layer: int) -> list[int] | None:
        record = self._recorded.get(place.sequence)
        if record is None or place.position is None:
            return None
        row = place.position - record.start
        if not 0 <= row < len(record.ids):
            return None
        moe_only = record.ids.shape[1] == len(record.moe_layers)
        column = record.moe_layers.index(layer) if moe_only else layer
        ids: list[int] = record.ids[row, column].tolist()
        return ids

    def _of_rows(self, values: torch.Tensor) -> list[Any]:
        chosen: list[Any] = values.detach()[self._rows.to(values.device)].tolist()
        return chosen

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
