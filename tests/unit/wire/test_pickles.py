"""Pickles are read where the caller allows it, and nowhere else."""

import base64
import pickle
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import RecordError
from serve_app.wire.registry import FORMATS, decode
from tests.unit.wire.samples import MODEL, NAMES, routes, same


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_read_for_allow_pickle_alone(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    bomb = base64.b64encode(pickle.dumps(Bomb(path), protocol=5)).decode()
    for name in (None, *NAMES):
        with pytest.raises(RecordError):
            decode(bomb, MODEL, format=name)
    with pytest.raises(RecordError, match="allow_pickle=True"):
        FORMATS["xtuner"].decode(bomb, MODEL)
    assert not path.exists()
    with pytest.raises(RecordError, match="got None"):
        decode(bomb, MODEL, allow_pickle=True)
    assert path.exists()
    listed = base64.b64encode(pickle.dumps(routes().ids.tolist(), protocol=4)).decode()
    same(decode(listed, MODEL, allow_pickle=True), routes())
    with pytest.raises(RecordError, match="pickled array, got"):
        decode(listed[:40], MODEL, allow_pickle=True)
