"""What crosses the public API: requests, results and batches. No Ray, no HTTP."""

from serve_app.types.batches import (
    BatchSpec,
    BatchTrack,
    ContextParallel,
    ExpertBatch,
    MissingRows,
    ModelShape,
    OnMissing,
    OutputDtype,
    PackedExperts,
    Pad,
    RankSlice,
    RoutedSequence,
    Tail,
    Where,
)
from serve_app.types.reports import (
    ShardStats,
    StoreStats,
    WeightsResult,
)
from serve_app.types.requests import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    OnDivergence,
    SleepLevel,
    UpdateMode,
)

__all__ = [
    "BatchSpec",
    "BatchTrack",
    "ContextParallel",
    "ExpertBatch",
    "FinishReason",
    "GenerateChunk",
    "GenerateRequest",
    "GenerateResult",
    "MissingRows",
    "ModelShape",
    "OnDivergence",
    "OnMissing",
    "OutputDtype",
    "PackedExperts",
    "Pad",
    "RankSlice",
    "RoutedSequence",
    "ShardStats",
    "SleepLevel",
    "StoreStats",
    "Tail",
    "UpdateMode",
    "WeightsResult",
    "Where",
]
