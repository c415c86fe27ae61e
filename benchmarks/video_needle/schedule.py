"""What each step of training sees (length, batch size, learning rate), from its number alone: so a run can resume."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.video_needle.data import MAX_BATCH
from benchmarks.video_needle.scene import STEPS
from omnisparse_flex.errors import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The plan of a whole run, however many pieces it is trained in.

    Attributes:
        stages: ``"512:3000,2048:1000,8192/2048:400"``: visual tokens and optimizer steps. Several lengths
            in one stage take turns.
        tokens: Visual tokens of a batch; its number of videos follows from their length.
        rounds: Questions of each kind about a video.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        cooldown: Share of all steps, at the end, over which the rate falls linearly to a twentieth.
        narration: Weight of the narration loss at visual tokens.
        recall: Weight of the narration loss at the names in questions.
        early: Decoder layers after which visual tokens already have to narrate, too; 0: only at the end.
        seed: Of weights and data.
    """

    stages: str = "512:3000,2048:1000,8192:400"
    tokens: int = 32768
    rounds: int = 4
    lr: float = 1.5e-3
    warmup: int = 150
    cooldown: float = 0.3
    narration: float = 0.5
    recall: float = 1.0
    early: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        parsed = self.parsed
        longest = max(length for lengths, _ in parsed for length in lengths)
        require(self.tokens >= longest, "tokens", f"be at least the longest video's {longest}", self.tokens)
        require(self.tokens <= 512 * MAX_BATCH, "tokens", f"be at most {512 * MAX_BATCH}", self.tokens)
        require(1 <= self.rounds <= 64, "rounds", "be in [1, 64]", self.rounds)
        require(0 < self.lr < 1, "lr", "be in (0, 1)", self.lr)
        require(self.warmup >= 1, "warmup", "be at least 1", self.warmup)
        require(0 <= self.cooldown <= 1, "cooldown", "be in [0, 1]", self.cooldown)
        require(self.narration >= 0, "narration", "be at least 0", self.narration)
        require(self.recall >= 0, "recall", "be at least 0", self.recall)
        require(self.early >= 0, "early", "be at least 0", self.early)
        require(0 <= self.seed < 256, "seed", "be in [0, 256)", self.seed)

    @property
    def parsed(self) -> list[tuple[tuple[int, ...], int]]:
        """The stages as (lengths in visual tokens, optimizer steps)."""
        try:
            pairs = [stage.split(":") for stage in self.stages.split(",")]
            parsed = [(tuple(int(n) for n in lengths.split("/")), int(steps)) for lengths, steps in pairs]
        except ValueError:
            raise ConfigError(f"stages must look like '512:3000,2048:1000', got {self.stages!r}") from None
        for lengths, steps in parsed:
            known = all(length in STEPS for length in lengths)
            require(known and steps > 0, "stages", f"hold lengths of {sorted(STEPS)} and positive steps", self.stages)
        return parsed

    @property
    def total(self) -> int:
        """All optimizer steps."""
        return sum(steps for _, steps in self.parsed)

    def length_at(self, step: int) -> int:
        """Visual tokens of a video at one step (0-based)."""
        for lengths, steps in self.parsed:
            if step < steps:
                return lengths[step % len(lengths)]
            step -= steps
        raise ConfigError(f"step must be below {self.total}, got {self.total + step}")

    def lr_at(self, step: int) -> float:
        """Learning rate of one step (0-based): up, level, down."""
        falling = max(1, round(self.cooldown * self.total))
        down = 1 if self.cooldown == 0 else min(1.0, max(0.05, (self.total - step) / falling))
        return self.lr * min(1.0, (step + 1) / self.warmup) * down

    def first_video(self, step: int) -> int:
        """Index in the training split of a step's first video; no two steps or seeds share one."""
        return (self.seed * (1 << 20) + step) * MAX_BATCH

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dataclasses.asdict(self)
