"""Routes without Ray: fetch a key, materialize keys, release them. Keys travel in bodies only."""

import math
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from serve_app.client.reading import Reader
from serve_app.errors import InvalidRequest, R3Error
from serve_app.ingress.edge.replica import Edge
from serve_app.ingress.guard.errors import Forbidden, NotAcceptable, documented
from serve_app.ingress.operations.formats import (
    NPY,
    OF_BATCHES,
    OF_RECORDS,
    OURS,
    Encoded,
    acceptable,
    encode_batch,
    encode_record,
)
from serve_app.records import Record, RecordMeta, part_of
from serve_app.store.base import RecordStore
from serve_app.types import (
    BatchSpec,
    BatchTrack,
    ContextParallel,
    OnMissing,
    OutputDtype,
    PackedExperts,
    Pad,
    RankSlice,
    RoutedSequence,
    Tail,
)

router = APIRouter(prefix="/routed_experts")

Key = Annotated[str, Field(min_length=1, max_length=1024)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Position = Annotated[int, Field(ge=0, lt=2**31)]
Parts = Annotated[int, Field(ge=1, le=2**16)]
Part = Annotated[int, Field(ge=0, lt=2**16)]
Accept = Annotated[str | None, Header()]
_MAX_KEYS = 65_536
# Which positions the key's rows have, whatever part of them was asked for, and how many rows
# one answer may carry.
START, STOP, MOST_ROWS = "x-r3serve-start", "x-r3serve-stop", "x-r3serve-most-rows"


class FetchBody(BaseModel):
    """A key, and which of its rows: ``rows`` of them from position ``first`` on, or all.

    ``head`` asks for no rows, only for the headers that say which there are.
    """

    key: Key
    first: Position | None = None
    rows: Count | None = None
    head: bool = False


class SequenceBody(BaseModel):
    """See `RoutedSequence`."""

    key: Key | None
    length: Count
    first: Position = 0


class RankBody(BaseModel):
    """See `RankSlice`."""

    seq_multiple: Parts = 1
    total_multiple: Parts = 1
    tail: Tail = "own_sequence"
    cp_size: Parts = 1
    cp_rank: Part = 0
    cp: ContextParallel = "zigzag"
    sp_size: Parts = 1
    sp_rank: Part = 0
    layers: Annotated[list[Part], Field(max_length=4096)] | None = None
    dense_layers: Literal["keep", "drop"] = "keep"

    def slice(self) -> RankSlice:
        """Return what it says."""
        given = self.model_dump(exclude={"layers"})
        return RankSlice(**given, layers=None if self.layers is None else tuple(self.layers))


class MaterializeBody(BaseModel):
    """See `RoutedExpertsClient.materialize`."""

    sequences: Annotated[list[SequenceBody], Field(min_length=1, max_length=_MAX_KEYS)]
    layout: Literal["packed", "padded"] = "packed"
    dtype: OutputDtype | None = None
    rank: RankBody = RankBody()
    on_missing: OnMissing = "raise"
    pad: Pad = "mask"
    pad_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tracks: Annotated[list[BatchTrack], Field(max_length=1)] = []

    def spec(self) -> BatchSpec:
        """Return what the batch is to look like."""
        return BatchSpec(
            dtype=self.dtype,
            on_missing=self.on_missing,
            layout=self.layout,
            rank=self.rank.slice(),
            pad=self.pad,
            pad_seed=self.pad_seed,
            tracks=tuple(self.tracks),
        )


class ReleaseBody(BaseModel):
    """Keys, or all under a tag, which takes an admin key: a tag is no secret."""

    keys: Annotated[list[Key], Field(max_length=_MAX_KEYS)] = []
    tag: str | None = None


class Released(BaseModel):
    """How many were live."""

    released: int


def _binary(kinds: tuple[str, ...]) -> dict[int | str, dict[str, Any]]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"description": "The routes.", "content": dict.fromkeys(kinds, schema)}}


@router.post(
    "/fetch",
    response_class=StreamingResponse,
    responses=_binary(OF_RECORDS) | documented(406),
)
async def fetch(body: FetchBody, edge: Edge, accept: Accept = None) -> Response:
    """Return a key's rows: r3serve's own form with everything, ``.npy``, or safetensors."""
    kind = acceptable(accept, OF_RECORDS)
    most = edge.args.max_answer_bytes

    def read(reader: Reader, _: RecordStore) -> tuple[Encoded, RecordMeta]:
        record = reader.get(body.key)
        if body.head:
            return Encoded(kind, ()), record.meta
        return encode_record(_part(record, body, kind, most), kind), record.meta

    encoded, meta = await edge.reading(read)
    most_rows = most // _row_nbytes(meta, kind)
    headers = {START: str(meta.start), STOP: str(meta.stop), MOST_ROWS: str(most_rows)}
    return _streamed(encoded, headers)


@router.post(
    "/materialize",
    response_class=StreamingResponse,
    responses=_binary(OF_BATCHES) | documented(406),
)
async def materialize(body: MaterializeBody, edge: Edge, accept: Accept = None) -> Response:
    """Return many keys as one batch: ids, validity, boundaries; ``.npy`` if every row is real."""
    kind = acceptable(accept, OF_BATCHES)
    most = edge.args.max_answer_bytes
    total = sum(sequence.length for sequence in body.sequences)
    if total > most:
        raise InvalidRequest(f"expected at most {most} bytes, these sequences have {total} rows")

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        _check_size(math.prod(shape) * dtype.itemsize, most)
        return np.empty(shape, dtype)

    def read(reader: Reader, _: RecordStore) -> PackedExperts:
        sequences = [RoutedSequence(one.key, one.length, one.first) for one in body.sequences]
        return reader.pack(sequences, body.spec(), allocate=allocate)

    try:
        batch = await edge.reading(read)
    except R3Error:
        raise
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(str(error)) from None
    if kind == NPY and not batch.valid.all():
        raise NotAcceptable("some rows are not valid, which .npy cannot say: accept safetensors")
    return _streamed(encode_batch(batch, kind), {})


@router.post("/release", response_model=Released, responses=documented())
async def release(body: ReleaseBody, edge: Edge, request: Request) -> Released:
    """End keys, or all under a tag; those that are gone already do no harm."""
    if body.tag is not None and not request.state.admin:
        raise Forbidden("releasing by tag needs an admin key: a tag is no secret")
    if not body.keys and body.tag is None:
        raise InvalidRequest("expected keys, or a tag")

    def end(_: Reader, store: RecordStore) -> int:
        return store.release(body.keys, tag=body.tag)

    return Released(released=await edge.reading(end))


def _row_nbytes(meta: RecordMeta, kind: str) -> int:
    """Return how much a row takes in an answer; of ragged tracks on average, rounded up."""
    return -(-(meta.nbytes if kind == OURS else meta.ids_nbytes) // meta.rows)


def _part(record: Record, body: FetchBody, kind: str, most: int) -> Record:
    meta = record.meta
    first = meta.start if body.first is None else body.first
    stop = meta.stop if body.rows is None else first + body.rows
    if not meta.start <= first < stop <= meta.stop:
        raise InvalidRequest(f"expected rows in [{meta.start}, {meta.stop}), got [{first}, {stop})")
    _check_size((stop - first) * _row_nbytes(meta, kind), most)
    if stop - first == meta.rows:
        return record
    if meta.raw:
        return Record(meta._replace(rows=stop - first), record.ids[first:stop])
    return part_of(record, first, stop)


def _check_size(nbytes: int, most: int) -> None:
    if nbytes > most:
        raise InvalidRequest(
            f"expected an answer of at most {most} bytes, this one has {nbytes}: ask for fewer"
            " rows, sequences or layers at once"
        )


def _streamed(encoded: Encoded, headers: dict[str, str]) -> StreamingResponse:
    headers = {**headers, "content-length": str(encoded.nbytes)}
    return StreamingResponse(_awaited(encoded.pieces()), headers=headers, media_type=encoded.kind)


async def _awaited(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
