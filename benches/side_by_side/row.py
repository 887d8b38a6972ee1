"""A row of the table: what is measured, and what it should come to."""

from dataclasses import dataclass
from typing import Callable


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    measure: Callable
    # None where it is measured for comparison alone.
    goal: float | None = None
    stretch: float | None = None
    # Whether more is better.
    more: bool = True
    unit: str = "times"

    def is_hit(self, value, goal):
        return value >= goal if self.more else value <= goal

    def verdict(self, value):
        if self.goal is None:
            return ""
        if self.stretch is not None and self.is_hit(value, self.stretch):
            return "HIT, stretch too"
        return "HIT" if self.is_hit(value, self.goal) else "MISS"

    def bound(self, value):
        """As a bound in words."""
        words = {"times": "{} times", "ms": "{} ms", "KiB": "{} KiB", "bytes": "{} bytes", "percent": "{} % of a core"}
        return ("at least " if self.more else "at most ") + words[self.unit].format(f"{value:g}")

    def value(self, value):
        return f"{value:.2f}"
