"""Forms in which routes leave, chosen by the client."""

import pytest

from serve_app.ingress.guard.errors import NotAcceptable
from serve_app.ingress.operations.formats import NPY, OF_RECORDS, OURS, SAFETENSORS, acceptable


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, OURS),
        ("*/*", OURS),
        ("application/octet-stream", OURS),
        (NPY, NPY),
        (f"text/html, {SAFETENSORS};q=0.5, {NPY};q=0.4", SAFETENSORS),
    ],
)
def test_the_form_is_what_the_client_would_rather_have(accept: str | None, kind: str) -> None:
    assert acceptable(accept, OF_RECORDS) == kind


@pytest.mark.parametrize("accept", [f"{NPY};q=0, {OURS};q=x", "text/html"])
def test_a_client_that_takes_no_form_hears_which_there_are(accept: str) -> None:
    with pytest.raises(NotAcceptable, match=f"one of {OURS}, .*, got '{accept[:9]}"):
        acceptable(accept, OF_RECORDS)
