"""What a command may take: hours, or money by the price of a worker's hour."""

import time

from dragonclf.config import BudgetConfig
from dragonclf.outcomes import BudgetSpentError


class Budget:
    """Hours count from when it is made, workers from when they are hired."""

    def __init__(self, config: BudgetConfig):
        self._config = config
        self._began_s = time.monotonic()
        self._hired_s: float | None = None
        self._num_workers = 0

    def hire(self, num_workers: int) -> None:
        self._num_workers = num_workers
        if self._hired_s is None:
            self._hired_s = time.monotonic()

    def ensure(self) -> None:
        """BudgetSpentError if it is spent."""
        now_s = time.monotonic()
        limit = self._config
        hours = (now_s - self._began_s) / 3600
        if limit.max_hours is not None and hours >= limit.max_hours:
            raise BudgetSpentError(
                f"stopped after {hours:.3g} hours, as --max-hours {limit.max_hours:g} asks: the same command goes on"
            )
        if limit.max_cost is not None and limit.price_per_worker_hour and self._hired_s is not None:
            cost = (now_s - self._hired_s) / 3600 * self._num_workers * limit.price_per_worker_hour
            if cost >= limit.max_cost:
                raise BudgetSpentError(
                    f"stopped after {self._num_workers} workers have cost {cost:.4g}, as --max-cost {limit.max_cost:g} asks: "
                    "the same command goes on, with the same sum again"
                )
