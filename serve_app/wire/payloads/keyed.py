"""Texts that are no payload but the key of one, in somebody's store."""

import base64
import re

_FOREIGN = re.compile(r"[0-9a-f]{56}")
"""LMDeploy's and patched SGLang's ``shared_store``: the hex of a Ray object id of 28 bytes."""
_OURS = re.compile(r"[A-Za-z0-9_-]{47,387}")
_TAIL_BYTES = 33


def is_key(payload: object) -> bool:
    """Tell whether a payload has the form of a key: ours, or a ``shared_store``'s hex.

    Form only: `serve_app.store.keys`, which makes ours, is above this layer, and only a store
    knows whether a key is real.
    """
    if not isinstance(payload, str):
        return False
    if _FOREIGN.fullmatch(payload):
        return True
    if not _OURS.fullmatch(payload) or len(payload) % 4 == 1:
        return False
    raw = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    return raw[0] == 1 and len(raw) == 2 + raw[1] + _TAIL_BYTES
