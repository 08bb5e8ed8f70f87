"""Where an engine's workers sit: their bundles of the placement group, and where they meet."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Seat:
    """One engine's part of a group: rank ``dp_rank`` of ``dp``.

    ``bundles`` are those of its workers in the current placement group, in the order of their
    ranks; without any the executor makes a group of its own. ``meeting`` is where all ranks meet;
    None where this engine is alone, so that its first worker names it.
    """

    bundles: tuple[int, ...] = ()
    dp_rank: int = 0
    meeting: tuple[str, int] | None = None

    def meeting_at(self, address: tuple[str, int]) -> "Seat":
        """Return this seat with the address that rank 0 gave."""
        return replace(self, meeting=address)


ALONE = Seat()
