"""The request ids under which sessions of HTTP clients run: theirs to abort and to begin anew."""

_PREFIX = "session-"


def session_name(session_id: int | None) -> str:
    """Return the request id under which a client's session runs, and is aborted."""
    return f"{_PREFIX}{session_id}"


def is_session(request_id: str) -> bool:
    """Tell whether a request runs under a session's name."""
    return request_id.startswith(_PREFIX)
