"""The order of ZipAR's decoding: which tokens each step feeds, and which tokens they predict."""

from __future__ import annotations

from dataclasses import dataclass, field

from omnisparse_flex.grid.request import Request


@dataclass(frozen=True)
class Fed:
    """A token that a forward takes.

    Attributes:
        place: Where it stands behind the prompt.
        token: The place whose token it is: its own, or that of the token which it copies.
        target: The place that it predicts; None: it is fed for its keys alone.
    """

    place: int
    token: int
    target: int | None


@dataclass
class Rows:
    """Rows in progress.

    At step 0 the prompt predicts the grid's first token. Step ``t`` feeds the latest token of every row that
    has started, and the *lead* of the next row: the end of the row before it. Where rows have no end, the lead
    is a copy of the latest token there is of the row before, at the place of that row's last token. Nobody sees the
    copy once that last token itself is fed.

    Attributes:
        starts: The step at which each row's first token was predicted.
        step: Forwards since the prompt.
    """

    request: Request
    starts: list[int] = field(default_factory=lambda: [0])
    step: int = 0

    @property
    def done(self) -> bool:
        """Whether every token is predicted."""
        return len(self.starts) == self.request.rows and self.step >= self.starts[-1] + self.request.columns - 1

    @property
    def behind(self) -> int:
        """Tokens there are of the last row that has started, before this step's forward."""
        return self.step - self.starts[-1]

    @property
    def tries(self) -> bool:
        """Whether this step predicts the next row's first token."""
        request = self.request
        first = request.min_window if request.window is None else request.window
        return len(self.starts) < request.rows and self.behind >= first

    @property
    def must_start(self) -> bool:
        """Whether that prediction is the row's last chance: the row before it is complete."""
        return self.request.window is not None or self.behind == self.request.columns

    def ongoing(self) -> list[Fed]:
        """The latest token of each row that has started."""
        request, fed = self.request, []
        for row, start in enumerate(self.starts):
            column, place = self.step - start - 1, row * request.line + self.step - start - 1
            if column < request.columns - 1:
                fed.append(Fed(place, place, place + 1))
            elif column == request.columns - 1 and row < request.rows - 1:
                leads = self.tries and self.lead() is None and row == len(self.starts) - 1
                fed.append(Fed(place, place, place + 1 if leads else None))
        return fed

    def lead(self) -> Fed | None:
        """What leads in the next row; None where the row before it has no end and its last token does so itself."""
        request, row = self.request, len(self.starts)
        place = row * request.line - 1
        if request.eol is not None:
            return Fed(place, place, place + 1)
        if self.behind == request.columns:
            return None
        return Fed(place, (row - 1) * request.line + self.behind - 1, place + 1)

    def completed(self) -> int | None:
        """The row below a row whose last token is fed in this step: its lead, if a copy, is replaced."""
        for row, start in enumerate(self.starts):
            if self.step == start + self.request.columns and self.request.eol is None:
                return row + 1
        return None
