"""What active rows have sampled, as arrays over slots.

A row is touched as an object when it joins and when it may have ended, not at every id: of 500 rows the objects have left
the processor's cache whenever a forward pass is over, and to fetch them again took longer than to draw.
"""

from collections.abc import Sequence

import numpy as np


class Drawn:
    """The ids of each slot since its row joined, their log-probabilities, and the random numbers of those to come."""

    def __init__(self, slots: int) -> None:
        self.count = np.zeros(slots, np.int64)
        """So many ids were sampled in a slot; 0 where no row is active."""
        self._known = np.zeros(slots, np.int64)  # tokens in the cache before them
        self._most = np.zeros(slots, np.int64)
        self._ids = np.zeros((slots, 1), np.int64)  # behind the last id of before
        self._logprobs, self._numbers = np.zeros((2, slots, 0))

    def begin(self, slot: int, ids: Sequence[int], numbers: Sequence[float]) -> None:
        """A row of ``ids`` joins, of which all but the last are in the cache; each number is to draw one more."""
        most = len(numbers)
        if (more := most - self._numbers.shape[1]) > 0:
            pad = (0, 0), (0, more)
            self._ids, self._logprobs = np.pad(self._ids, pad), np.pad(self._logprobs, pad)
            self._numbers = np.pad(self._numbers, pad)
        self.count[slot], self._known[slot], self._most[slot] = 0, len(ids) - 1, most
        self._ids[slot, 0], self._numbers[slot, :most] = ids[-1], numbers

    def known(self, rows: int) -> list[int]:
        """How many tokens the cache holds of each of the first ``rows`` slots."""
        return (self._known[:rows] + self.count[:rows]).tolist()

    def last(self, rows: int) -> list[list[int]]:
        """The id that goes through the model next, alone in a list."""
        return self._ids[range(rows), self.count[:rows], None].tolist()

    def numbers(self, rows: int) -> np.ndarray:
        """The number that each slot's next id is drawn with."""
        return self._numbers[range(rows), self.count[:rows]]

    def add(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[bool]:
        """Note the next id of each of the first slots; tells which have as many as they may."""
        slots, count = range(len(ids)), self.count[: len(ids)]
        self._logprobs[slots, count] = logprobs
        count += 1
        self._ids[slots, count] = ids
        return (count == self._most[: len(ids)]).tolist()

    def end(self, slot: int) -> tuple[list[int], list[float]]:
        """Ids and log-probabilities of a slot, which is not active any more."""
        count, self.count[slot] = int(self.count[slot]), 0
        return self._ids[slot, 1 : count + 1].tolist(), self._logprobs[slot, :count].tolist()

    def move(self, to: Sequence[int], of: Sequence[int]) -> None:
        """Let slots ``to`` have what slots ``of`` have, which count as left where nobody moves there."""
        count = self.count[of]
        for array in (self._known, self._most, self._ids, self._logprobs, self._numbers):
            array[to] = array[of]
        self.count[of] = 0
        self.count[to] = count
