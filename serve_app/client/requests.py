"""What both clients do with requests: which one is meant, and what became of a batch's member."""

from serve_app.errors import R3Error
from serve_app.types import GenerateRequest, GenerateResult


def which(request_id: str | None, everything: bool) -> str | None:
    """Return the one request to abort, None for all; raise `ValueError` unless one is chosen."""
    if (request_id is None) != everything:
        raise ValueError(f"expected a request_id or all=True, got {request_id=} all={everything}")
    return request_id


def failed(request: GenerateRequest, error: R3Error) -> GenerateResult:
    """Return the result of a batch's member that could not be sampled."""
    return GenerateResult(
        request_id=request.request_id,
        output_ids=[],
        logprobs=[],
        text="",
        finish_reason="error",
        prompt_tokens=len(request.input_ids),
        weight_version=-1,
        error=f"{type(error).__name__}: {error}",
    )
