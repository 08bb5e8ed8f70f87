"""Checkpointed functions that run a second time in backward, and take their routes along.

torch's checkpoint functions are intercepted while a replay is open, whoever calls them: the model,
a wrapper in it, or the user around all of it. A function given to them is wrapped in a
`Recomputation`, which the autograd graph keeps and frees; nothing stays behind on the model. What
it was in its first run decides what its later runs force, also in another thread of autograd,
after the context was left, and in checkpoints within checkpoints.

A checkpoint that is none of torch's can be seen in its forward only, as an ``autograd.Function``
that has the model in it; `unbound_functions` finds those that would route natively later.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
import torch.utils.checkpoint

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_GENERATOR = "_checkpoint_without_reentrant_generator"
# The second has imported the name from the first.
_GENERATOR_MODULES = (
    "torch.utils.checkpoint",
    "torch.distributed._composable.checkpoint_activation",
)


class _Run(threading.local):
    """What one thread is at in one replay."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.collecting: list[set[int]] = []


class Progress:
    """Which layer's router runs, and which layers ran in what is being collected, by thread."""

    def __init__(self) -> None:
        self._run = _Run()

    @property
    def layer(self) -> int | None:
        """The layer whose router runs in this thread, if one does."""
        return self._run.layer

    @contextmanager
    def routing(self, layer: int) -> Iterator[None]:
        """Note that a router runs."""
        before = self._run.layer
        self._run.layer = layer
        for layers in self._run.collecting:
            layers.add(layer)
        try:
            yield
        finally:
            self._run.layer = before

    @contextmanager
    def collecting(self, layers: set[int]) -> Iterator[None]:
        """Add to ``layers`` what runs inside."""
        collecting = self._run.collecting
        collecting.append(layers)
        try:
            yield
        finally:
            del collecting[next(at for at, one in enumerate(collecting) if one is layers)]


class Replaying(Protocol):
    """A replay, as its recomputations see it."""

    progress: Progress

    def again(self, layers: set[int], layer: int | None) -> AbstractContextManager[None]:
        """Force the routers of ``layers`` again, and the choice of ``layer`` here and now."""


class Recomputation:
    """``function``, forcing again what it forced in its first run."""

    def __init__(self, function: Callable[..., Any], replay: Replaying) -> None:
        self._function = function
        self._replay = replay
        self._layer = replay.progress.layer
        self._layers: set[int] = set()
        self._ran = False

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """Note what is forced inside: that is the first run, whoever calls the function."""
        self._ran = True
        with self._replay.progress.collecting(self._layers):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function; from its second run on with its routes."""
        if not self._ran:
            with self.first_run():
                return self._function(*args, **kwargs)
        if not self._layers and self._layer is None:
            return self._function(*args, **kwargs)
        with self._replay.again(self._layers, self._layer):
            return self._function(*args, **kwargs)


class _Interception:
    """torch's checkpoint functions, replaced while any replay is open in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Replaying] = []
        self._generators: dict[str, Callable[..., Iterator[None]]] = {}

    @contextmanager
    def of(self, replay: Replaying) -> Iterator[None]:
        """Wrap what is checkpointed inside. Replays of several threads may end in any order."""
        with self._lock:
            self._open.append(replay)
            if len(self._open) == 1:
                self._install()
        try:
            yield
        finally:
            with self._lock:
                del self._open[next(at for at, one in enumerate(self._open) if one is replay)]
                if not self._open:
                    self._remove()

    def _install(self) -> None:
        reentrant: Any = torch.utils.checkpoint.CheckpointFunction
        inherited = reentrant.apply

        def apply(function: Callable[..., Any], *rest: Any) -> Any:
            for replay in list(self._open):
                function = Recomputation(function, replay)
            return inherited(function, *rest)

        reentrant.apply = staticmethod(apply)
        for name in _GENERATOR_MODULES:
            if name in sys.modules:
                generator = getattr(sys.modules[name], _GENERATOR)
                self._generators[name] = generator
                setattr(sys.modules[name], _GENERATOR, self._wrapping(generator))

    def _wrapping(self, generator: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
        """Wrap torch's generator, which yields while its caller runs the function first."""

        def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
            wrapping = self._wrapped_by(list(self._open), generator, function, args, kwargs)
            yield from wrapping

        return wrapped

    def _wrapped_by(
        self,
        replays: list[Replaying],
        generator: Callable[..., Iterator[None]],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Iterator[None]:
        if not replays:
            yield from generator(function, *args, **kwargs)
            return
        recomputation = Recomputation(function, replays.pop())
        with recomputation.first_run():
            yield from self._wrapped_by(replays, generator, recomputation, args, kwargs)

    def _remove(self) -> None:
        reentrant: Any = torch.utils.checkpoint.CheckpointFunction
        del reentrant.apply
        for name, generator in self._generators.items():
            setattr(sys.modules[name], _GENERATOR, generator)
        self._generators.clear()


INTERCEPTION = _Interception()


def unbound_functions() -> list[str]:
    """Name the ``autograd.Function``s around the caller that may call it again in backward.

    Not those that were given a `Recomputation` to call, nor those that nothing is to be
    differentiated through.
    """
    names: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        given = frame.f_locals["args"] if frame.f_code is _APPLY else ()
        bound = any(isinstance(one, Recomputation) for one in given)
        differentiable = any(isinstance(one, torch.Tensor) and one.requires_grad for one in given)
        if differentiable and not bound:
            names.append(frame.f_locals["cls"].__qualname__)
        frame = frame.f_back
    return names
