"""What the demo shows: a row a step, and whether the steps kept what replay promises."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

KL_FACTOR = 5


@dataclass(frozen=True, slots=True)
class Gap:
    """How far a trainer's pass was from the sampler.

    ``different`` is the share of (token, layer) pairs routed differently, ``kl`` the mean on the
    sampled tokens, ``ratio`` the largest factor between the two probabilities of one token.
    """

    different: float
    kl: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's rows: with routes, masked for want of them, and refused as no router's choice."""

    replayed: int
    masked: int
    refused: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one training step saw."""

    step: int
    reward: float
    tokens: int
    sampled: int
    key_bytes: int
    base64_bytes: int
    json_bytes: int
    without: Gap
    replayed: Gap
    materialize_s: float
    live_keys: int
    rows: Rows
    replay_happened: bool
    verdict: str


class Board:
    """The table while it grows, and below it what is being done now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.monotonic()
        self._reports: list[StepReport] = []
        self._spinner = Spinner("dots")
        self._live = Live(console=console, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the table as it is now on the screen."""
        if self._live.is_started:
            self._live.stop()
        if self._reports:
            self._console.print(table(self._reports))

    def now(self, doing: str) -> None:
        """Say what is being done; a line of its own where nothing can be redrawn."""
        if self._live.is_started:
            self._spinner.update(text=f" {doing} …")
            self._live.update(self._picture())
        else:
            self._console.print(f"{time.monotonic() - self._begun:5.1f} s  {doing}")

    def add(self, report: StepReport) -> None:
        """Show one more row."""
        self._reports.append(report)
        if self._live.is_started:
            self._live.update(self._picture())

    def _picture(self) -> RenderableType:
        return Group(table(self._reports), self._spinner) if self._reports else self._spinner


def table(reports: Sequence[StepReport]) -> Table:
    """Return one row a step; pairs of values are without → with replay."""
    result = Table(
        title="Rollout routing replay: without → with", title_justify="left", box=SIMPLE_HEAD
    )
    for heading in (
        "step",
        "reward",
        "tokens",
        "routes as key\n/ base64 / JSON",
        "routed\ndifferently",
        "KL (k3)",
        "largest\nratio",
        "replayed\n/masked\n/refused",
        "mate-\nrialize",
        "live\nkeys",
    ):
        result.add_column(heading, justify="right", overflow="fold")
    for each in reports:
        result.add_row(
            f"{each.step}",
            f"{each.reward:.3f}",
            f"{each.tokens:,}",
            f"{_kb(each.key_bytes)} / {_kb(each.base64_bytes)} / {_kb(each.json_bytes)} kB",
            f"{each.without.different:.2%} → {_share(each.replayed.different)}",
            f"{each.without.kl:.1e} → {each.replayed.kl:.1e}",
            f"{each.without.ratio:.2f} → {each.replayed.ratio:.2f}",
            f"{each.rows.replayed:,}/{each.rows.masked:,}/{each.rows.refused:,}",
            f"{each.materialize_s * 1e3:.0f} ms",
            f"{each.live_keys}",
        )
    return result


def broken_promises(reports: Sequence[StepReport]) -> list[str]:
    """Return a line for everything that should have held and did not."""
    broken = [
        f"step {each.step}: without replay no token was routed differently, so there is no gap"
        for each in reports
        if not each.without.different > 0
    ]
    broken += [
        f"step {each.step}: with replay {each.replayed.different:.3%} of (token, layer) pairs were"
        " routed differently, expected exactly 0"
        for each in reports
        if each.replayed.different != 0
    ]
    if not _mean_kl(reports)[1] * KL_FACTOR <= _mean_kl(reports)[0]:
        without, replayed = _mean_kl(reports)
        broken.append(
            f"mean KL is {replayed:.2e} with replay and {without:.2e} without, expected at most"
            f" 1/{KL_FACTOR} of it"
        )
    broken += [f"step {each.step}: {each.verdict}" for each in reports if not each.replay_happened]
    if left := reports[-1].live_keys:
        broken.append(f"{left} keys are live at the end, expected 0")
    return broken


def summary(reports: Sequence[StepReport]) -> str:
    """Tell in plain words what happened."""
    without, replayed = _mean_kl(reports)
    keys = sum(each.key_bytes for each in reports)
    base64 = sum(each.base64_bytes for each in reports)
    as_json = sum(each.json_bytes for each in reports)
    different = statistics.fmean(each.without.different for each in reports)
    return (
        f"By GRPO step {len(reports)} the engine had sampled"
        f" {sum(each.sampled for each in reports):,} tokens in bf16 and the trainer had learned"
        " from them in fp32.\n"
        f"Left alone, the trainer chose other experts in {different:.2%} of all (token, layer)"
        f" pairs; replaying the recorded ones it chose the same in"
        f" {_all_but(max(each.replayed.different for each in reports))} of them.\n"
        f"That brought the KL between the two from {without:.1e} down to {replayed:.1e}: by a"
        f" factor of {without / replayed:.1f}.\n"
        f"The routes crossed the control path as keys of {_kb(keys)} kB in all; as base64 they are"
        f" {_kb(base64)} kB ({base64 / keys:.0f} times that), as JSON {_kb(as_json)} kB"
        f" ({as_json / keys:.0f} times).\n"
        f"A trace of one rollout a step, recorded experts beside those of the batch and those that"
        f" the routers used; the last step's: {reports[-1].verdict}."
    )


def _mean_kl(reports: Sequence[StepReport]) -> tuple[float, float]:
    return (
        statistics.fmean(each.without.kl for each in reports),
        statistics.fmean(each.replayed.kl for each in reports),
    )


def _share(share: float) -> str:
    # Rounding must not show a few differences as none.
    return "0" if share == 0 else f"{share:.2%}"


def _all_but(share: float) -> str:
    return "every one" if share == 0 else f"{1 - share:.3%}"


def _kb(size: int) -> str:
    return f"{size / 1000:,.0f}"
