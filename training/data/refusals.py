"""Rows that are skipped: counted by source and reason, with examples, up to a share that stops the run.

Everything that skips a row, a page or a file says so here, so that nothing is lost silently and one bad row is never
the end of a run:

    refusals = Refusals()
    for name, row in rows:
        try:
            use(row)
        except ValueError as error:
            refusals.add("receipts", "image: cannot be opened", f"{name}: {error}")
        else:
            refusals.accept("receipts")
    refusals.check()
    print(refusals)
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

# Ours: a web-scale set has some per cent of dead images; above that, most often, a column or a path is wrong.
MAX_SHARE = 0.05
# Ours: below so many rows of a source a share says little, and the run goes on.
MIN_ROWS = 200
EXAMPLES = 3
EXAMPLE_LENGTH = 200  # characters


class TooManyRefused(ValueError):
    """More of a source was refused than is allowed. The message is one line that names the worst offenders."""


@dataclass
class _Counts:
    accepted: int = 0
    reasons: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        return self.reasons.total()

    @property
    def share(self) -> float:
        return self.refused / max(self.accepted + self.refused, 1)


class Refusals:
    """Counts of accepted and refused rows by source, and of the latter by reason.

    A source is what a user would take away or mend as one (a data set, a package, an archive); a reason is a short
    phrase that many rows share (`"image: truncated"`); an example names one row and may go on about it.

    Args:
        max_share: refused rows of a source, relative to all of it, above which the run stops; 1 never stops it.
        min_rows: rows of a source that are looked at before the share is minded.
        examples: how many are kept for each reason of a source.

    Raises:
        ValueError: a share outside [0, 1].
    """

    def __init__(self, max_share: float = MAX_SHARE, min_rows: int = MIN_ROWS, examples: int = EXAMPLES):
        if not 0.0 <= max_share <= 1.0:
            raise ValueError(f"max_share must lie in [0, 1], got {max_share}")
        self.max_share, self.min_rows, self.examples = max_share, min_rows, examples
        self._sources: dict[str, _Counts] = {}

    def accept(self, source: str, count: int = 1) -> None:
        """Count rows that were used."""
        self._of(source).accepted += count

    def add(self, source: str, reason: str, example: str = "") -> None:
        """Count a row that was skipped. The first of each reason is logged as a warning.

        Raises:
            TooManyRefused: the source's refused share is above `max_share`, of `min_rows` rows or more.
        """
        counts = self._of(source)
        counts.reasons[reason] += 1
        example = " ".join(example.split())
        if len(example) > EXAMPLE_LENGTH:
            example = example[: EXAMPLE_LENGTH - 1] + "…"
        kept = counts.examples.setdefault(reason, [])
        if example and len(kept) < self.examples:
            kept.append(example)
        if counts.reasons[reason] == 1:
            logger.warning("%s: skipped, %s%s (further ones are counted)", source, reason, example and f": {example}")
        if counts.accepted + counts.refused >= self.min_rows:
            self._check(source)

    def check(self) -> None:
        """Mind the share of every source, however few its rows: for the end of a set that was read whole.

        Raises:
            TooManyRefused: as `add`.
        """
        for source in sorted(self._sources, key=lambda source: -self._sources[source].share):
            self._check(source)

    def _check(self, source: str) -> None:
        counts = self._sources[source]
        if counts.share <= self.max_share:
            return
        worst = "; ".join(
            f"{reason} ({count} times"
            + (f", e.g. {counts.examples[reason][0]}" if counts.examples.get(reason) else "")
            + ")"
            for reason, count in counts.reasons.most_common(3)
        )
        raise TooManyRefused(
            f"{source}: {counts.refused} of {counts.accepted + counts.refused} rows were refused, more than the "
            f"{self.max_share:.0%} that may be. Worst: {worst}"
        )

    def _of(self, source: str) -> _Counts:
        return self._sources.setdefault(source, _Counts())

    @property
    def accepted(self) -> int:
        """Rows used, of all sources."""
        return sum(counts.accepted for counts in self._sources.values())

    @property
    def refused(self) -> int:
        """Rows skipped, of all sources."""
        return sum(counts.refused for counts in self._sources.values())

    def merge(self, other: Refusals) -> None:
        """Add what another process counted.

        Raises:
            TooManyRefused: as `add`.
        """
        for source, theirs in other._sources.items():
            counts = self._of(source)
            counts.accepted += theirs.accepted
            counts.reasons.update(theirs.reasons)
            for reason, examples in theirs.examples.items():
                kept = counts.examples.setdefault(reason, [])
                kept += examples[: self.examples - len(kept)]
            if counts.accepted + counts.refused >= self.min_rows:
                self._check(source)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``{source: {"accepted", "refused", "reasons": {reason: {"count", "examples"}}}}``, the most
        frequent reason first."""
        return {
            source: {
                "accepted": counts.accepted,
                "refused": counts.refused,
                "reasons": {
                    reason: {"count": count, "examples": list(counts.examples.get(reason, ()))}
                    for reason, count in counts.reasons.most_common()
                },
            }
            for source, counts in self._sources.items()
        }

    def load_dict(self, state: dict[str, Any]) -> None:
        """Count on from an `as_dict`: a run that goes on knows what was skipped before."""
        self._sources = {
            source: _Counts(
                accepted=counts["accepted"],
                reasons=Counter({reason: each["count"] for reason, each in counts["reasons"].items()}),
                examples={reason: list(each["examples"]) for reason, each in counts["reasons"].items()},
            )
            for source, counts in state.items()
        }

    def __str__(self) -> str:
        """A line for each source, its reasons after it, most frequent first."""
        return "\n".join(
            f"{source}: {counts.accepted} rows, {counts.refused} refused"
            + "".join(f"{', ' if place else ': '}{reason} {count}" for place, (reason, count) in reasons)
            for source, counts in self._sources.items()
            for reasons in [list(enumerate(counts.reasons.most_common(12)))]
        )
