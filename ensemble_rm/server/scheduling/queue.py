"""What waits to be scored: first come first served, with those that share a prompt pulled along.

Pure and synchronous: no clock, no event loop, no HTTP, no models. `batching.py` drives it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
S = TypeVar("S")


@dataclass(eq=False)
class Ticket(Generic[K, S]):
    """One request in the queue.

    Attributes
    ----------
    key : hashable
        Requests of different keys never share a batch: the version that scores them.
    samples : sequence
    groups : sequence of hashable
        What each sample shares with others: its prompt.
    costs : sequence of (int, int)
        Tokens of each sample: of what is shared, counted once a batch, and of its own.
    taken : int
        Samples that are scored already or are being scored.
    group : hashable, optional
        That of all its samples; None where there are several.
    """

    key: K
    samples: Sequence[S]
    groups: Sequence[Hashable]
    costs: Sequence[tuple[int, int]]
    taken: int = 0
    group: Hashable | None = field(init=False)

    def __post_init__(self) -> None:
        first = self.groups[0]
        self.group = first if all(group == first for group in self.groups) else None

    @property
    def left(self) -> int:
        """Samples that wait."""
        return len(self.samples) - self.taken

    @property
    def tokens_left(self) -> int:
        """Their tokens, as if nothing were shared."""
        return sum(shared + own for shared, own in self.costs[self.taken :])

    @property
    def shared_left(self) -> int:
        """Those of them that samples of one group share."""
        return sum(shared for shared, _ in self.costs[self.taken :])


@dataclass(frozen=True)
class Part(Generic[K, S]):
    """The samples of one ticket that a batch takes: those from `start` to `stop`."""

    ticket: Ticket[K, S]
    start: int
    stop: int

    @property
    def samples(self) -> Sequence[S]:
        """The samples themselves."""
        return self.ticket.samples[self.start : self.stop]


@dataclass
class _Filling(Generic[K, S]):
    """A batch as it fills."""

    tokens: int
    rows: int
    groups: set[Hashable] = field(default_factory=set)
    parts: list[Part[K, S]] = field(default_factory=list)
    count: int = 0
    used: int = 0

    def cost(self, ticket: Ticket[K, S], row: int) -> int:
        """Tokens that a sample adds."""
        shared, own = ticket.costs[row]
        return own + (0 if ticket.groups[row] in self.groups else shared)

    def fits(self, ticket: Ticket[K, S], row: int | None = None) -> bool:
        """Whether a ticket's next sample, or the one named, fits; an empty batch takes any."""
        at = ticket.taken if row is None else row
        if self.count == 0:
            return True
        return self.count < self.rows and self.used + self.cost(ticket, at) <= self.tokens

    def add(self, ticket: Ticket[K, S]) -> bool:
        """Take what fits of a ticket; say whether all did."""
        start = stop = ticket.taken
        while stop < len(ticket.samples) and self.fits(ticket, stop):
            self.used += self.cost(ticket, stop)
            self.groups.add(ticket.groups[stop])
            self.count += 1
            stop += 1
        self.parts.append(Part(ticket, start, stop))
        ticket.taken = stop
        return stop == len(ticket.samples)


class FairQueue(Generic[K, S]):
    """Tickets in the order of their arrival, formed into batches within a budget.

    The laws: the ticket that waits longest is in the next batch; another overtakes it only by
    sharing the prompt of one that is before it; what a batch has no room for comes back at the
    end, so that a large request does not hold up small ones; a batch exceeds the budget only where
    its one sample does.

    Parameters
    ----------
    tokens : int
        Of a batch, a shared prompt counted once.
    rows : int
        Samples of a batch at most.
    """

    def __init__(self, *, tokens: int, rows: int) -> None:
        self._budget, self._rows = tokens, rows
        self._order: OrderedDict[int, Ticket[K, S]] = OrderedDict()
        self._numbers: dict[Ticket[K, S], int] = {}
        self._groups: dict[Hashable, OrderedDict[int, Ticket[K, S]]] = {}
        self._next = count()
        self.samples = 0
        self.tokens = 0
        self._apart = 0  # tokens, where those of one prompt count it once

    def __len__(self) -> int:
        return len(self._order)

    @property
    def full_batch(self) -> bool:
        """Whether what waits would fill a batch, each request's prompt counted once."""
        return self._apart >= self._budget or self.samples >= self._rows

    def push(self, ticket: Ticket[K, S]) -> None:
        """Put a ticket at the end."""
        number = next(self._next)
        self._numbers[ticket] = number
        self._order[number] = ticket
        self.samples += ticket.left
        self.tokens += ticket.tokens_left
        self._apart += ticket.tokens_left
        group = ticket.group
        if group is not None:
            friends = self._groups.setdefault(group, OrderedDict())
            self._apart -= ticket.shared_left - (0 if friends else ticket.costs[0][0])
            friends[number] = ticket

    def drop(self, ticket: Ticket[K, S]) -> bool:
        """Take a ticket out; say whether it was there."""
        number = self._numbers.pop(ticket, None)
        if number is None:
            return False
        del self._order[number]
        self.samples -= ticket.left
        self.tokens -= ticket.tokens_left
        self._apart -= ticket.tokens_left
        group = ticket.group
        if group is not None:
            friends = self._groups[group]
            del friends[number]
            self._apart += ticket.shared_left - (0 if friends else ticket.costs[0][0])
            if not friends:
                del self._groups[group]
        return True

    def take(self) -> list[Part[K, S]]:
        """Form the next batch; empty where nothing waits."""
        batch: _Filling[K, S] = _Filling(self._budget, self._rows)
        while self._order:
            head = next(iter(self._order.values()))
            if batch.parts and head.key != batch.parts[0].ticket.key:
                break
            if not self._move(head, batch):
                break
            if head.group is not None and not self._pull(head, batch):
                break
        return batch.parts

    def _pull(self, head: Ticket[K, S], batch: _Filling[K, S]) -> bool:
        """Take those along that share the head's prompt; say whether all fitted."""
        for friend in list(self._groups.get(head.group, {}).values()):
            if friend.key == head.key and not self._move(friend, batch):
                return False
        return True

    def _move(self, ticket: Ticket[K, S], batch: _Filling[K, S]) -> bool:
        """Take what fits of a ticket into the batch; say whether all did.

        A part that is left over goes to the end; a ticket of which nothing fits stays where it is.
        """
        if not batch.fits(ticket):
            return False
        self.drop(ticket)
        whole = batch.add(ticket)
        if not whole:
            self.push(ticket)
        return whole
