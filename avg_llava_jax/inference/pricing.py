"""The price of visual tokens follows the load: an engine with a promise chooses coarser before requests wait.

If the router chooses granularities, the engine predicts when the newest request will have its first token, and raises
the cost weight λ as that time approaches the promise:

    predicted = requests without a first token * seconds per first token, over the last `EVENTS` of them
    share     = predicted share of the promise's second half: 0 up to half of the promise, 1 from the whole on
    λ         = low + share / (1 - share), at most high

    promise 1 s, λ from 0 to 100, 0.05 s per first token    10 requests wait: 0.5 s,  share 0,   λ 0
                                                            15                0.75 s, share 0.5, λ 1
                                                            18                0.9 s,  share 0.8, λ 4
                                                            20 or more        1 s,    share 1,   λ 100

From `UNROUTED` on, the router is skipped, because it takes time as well: images get the coarsest granularity. Coarser
granularities take less time, so the predicted seconds per first token fall, and λ settles where the load is met. The
caller passes all times; no clock is read here.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

EVENTS = 32
UNROUTED = 100.0


@dataclasses.dataclass(frozen=True)
class Slo:
    """A promise: seconds from `submit` to the first token, and the cost weights λ that may be used to keep it."""

    ttft: float
    low: float = 0.0
    high: float = UNROUTED

    def __post_init__(self) -> None:
        if not 0 < self.ttft < math.inf:
            raise ValueError(f"slo_ttft={self.ttft:g} must be over 0 seconds, and finite")
        if not 0 <= self.low <= self.high < math.inf:
            raise ValueError(f"slo_cost_weights={self.low:g},{self.high:g} must be 0 or more, finite and ascending")


class Pricing:
    """λ of an engine; see the module's docstring."""

    def __init__(self, slo: Slo):
        self.slo = slo
        self._last = -math.inf
        self._took: deque[float] = deque(maxlen=EVENTS)

    def first_token(self, submitted: float, now: float) -> None:
        """A request that was submitted then has its first token now. Idle time does not count."""
        self._took.append(now - max(self._last, submitted))
        self._last = now

    def predicted(self, waiting: int) -> float:
        """Seconds until each of `waiting` requests has its first token; 0 before anything was measured."""
        return waiting * sum(self._took) / len(self._took) if self._took else 0.0

    def cost_weight(self, waiting: int) -> float:
        """λ while so many requests have no first token."""
        share = max(2 * self.predicted(waiting) / self.slo.ttft - 1, 0.0)
        return self.slo.high if share >= 1 else min(self.slo.low + share / (1 - share), self.slo.high)
