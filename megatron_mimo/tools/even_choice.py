"""Some of many items, for a page that cannot show all of them."""


class EvenChoice[T]:
    """Choice of some of many items, spread evenly, for an unknown number of items.

    Args:
        number: Number of items to choose.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._kept: list[T] = []
        self._offered = 0
        self._every = 1

    def offer(self, item: T) -> None:
        """Add the next item."""
        if self._number and self._offered % self._every == 0:
            self._kept.append(item)
            if len(self._kept) == 2 * self._number:
                del self._kept[1::2]
                self._every *= 2
        self._offered += 1

    def taken(self) -> list[T]:
        """Chosen items, in order."""
        kept, number = self._kept, self._number
        if len(kept) <= number:
            return kept
        return [kept[i * len(kept) // number] for i in range(number)]
