"""What crosses the public API: requests, results and batches. No Ray, no HTTP."""

from serve_app.types.batches import (
    BatchSpec,
    ExpertBatch,
    MissingRows,
    OnMissing,
    OutputDtype,
    PackedExperts,
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
    SleepLevel,
    UpdateMode,
)

__all__ = [
    "BatchSpec",
    "ExpertBatch",
    "FinishReason",
    "GenerateChunk",
    "GenerateRequest",
    "GenerateResult",
    "MissingRows",
    "OnMissing",
    "OutputDtype",
    "PackedExperts",
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
