"""An LRU cache with a limit in bytes. Knows the weights of values, not their meaning."""

from collections import OrderedDict
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class LRU(Generic[Value]):
    def __init__(self, limit: int) -> None:
        """`limit`: of all weights together, in bytes."""
        self.limit = limit
        self._size = 0
        self._items: OrderedDict[Any, tuple[Value, int]] = OrderedDict()

    def get(self, key: Any) -> Value | None:
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        return item[0]

    def put(self, key: Any, value: Value, weight: int) -> None:
        self.drop(key)
        self._items[key] = value, weight
        self._size += weight
        while self._size > self.limit:
            self._size -= self._items.popitem(last=False)[1][1]

    def drop(self, key: Any) -> None:
        self._size -= self._items.pop(key, (None, 0))[1]

    def clear(self) -> None:
        self._items.clear()
        self._size = 0
