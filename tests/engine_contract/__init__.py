"""What every engine must do, written against the Protocol alone.

A test module subclasses `EngineContract` and provides three fixtures: ``engine`` (records on, a
tokenizer of one token a byte, at least 4 slots), ``make_engine`` (the same with other
`EngineArgs`, stopped after the test) and ``reference`` (the same model in plain Transformers).
"""

from tests.engine_contract.contract import EngineContract
from tests.engine_contract.maker import MakeEngine, engine_maker
from tests.engine_contract.records import agreement, check_rows
from tests.engine_contract.reference import Weights
from tests.engine_contract.requests import LONG, NEW, PROMPT, mixed_requests, request
from tests.engine_contract.rollouts import (
    Sampled,
    Started,
    first_new_token,
    sample,
    sample_group,
    submitted,
)

__all__ = [
    "LONG",
    "NEW",
    "PROMPT",
    "EngineContract",
    "MakeEngine",
    "Sampled",
    "Started",
    "Weights",
    "agreement",
    "check_rows",
    "engine_maker",
    "first_new_token",
    "mixed_requests",
    "request",
    "sample",
    "sample_group",
    "submitted",
]
