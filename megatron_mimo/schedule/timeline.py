"""When each action of a step starts and ends, given how long forwards and backwards take.

Pure arithmetic over lists of actions: it draws schedules, judges what the executor achieves, and
proves that a schedule has no deadlock.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.schedule.actions import Action, Kind, Module, Role, role_of
from megatron_mimo.topology import Layout

_COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
# (rank, action): what happens, and where.
Place = tuple[int, Action]


@dataclass(frozen=True, slots=True)
class Event:
    """One action of one rank.

    Attributes:
        rank: Global rank.
        action: What it does.
        start: When it has what it needs.
        end: When it is done.
        cause: What it waited for: the action of its own rank before it, or another rank's.
    """

    rank: int
    action: Action
    start: float
    end: float
    cause: Place | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A step, in the unit of the durations.

    Attributes:
        events: Every action, by rank in its order.
    """

    events: Mapping[Place, Event]

    @property
    def makespan(self) -> float:
        """From the start of the step to its end."""
        return max(event.end for event in self.events.values())

    def busy(self, rank: int) -> float:
        """Time that a rank computes."""
        return sum(e.end - e.start for e in self.compute(rank))

    def compute(self, rank: int) -> Iterator[Event]:
        """Forwards and backwards of a rank, in order."""
        return (e for e in self.events.values() if e.rank == rank and e.action.kind in _COMPUTE)

    def critical_path(self) -> list[Event]:
        """The chain of forwards and backwards that makes the step as long as it is."""
        event: Event | None = max(self.events.values(), key=lambda e: e.end)
        path = []
        while event is not None:
            if event.action.kind in _COMPUTE:
                path.append(event)
            event = None if event.cause is None else self.events[event.cause]
        return path[::-1]


def timeline(
    layout: Layout,
    schedule: Mapping[Role, Sequence[Action]],
    duration: Callable[[int, Action], float],
) -> Timeline:
    """Run a schedule on paper. Only forwards and backwards take time.

    Args:
        layout: Both grids.
        schedule: Actions of every role, from `build_schedule`.
        duration: Of a rank's forward or backward, in any unit.

    Raises:
        RuntimeError: The schedule never ends; names the ranks and the actions that wait.
    """
    feeds = _Feeds(layout)
    lists = {rank: schedule[role_of(layout, rank)] for rank in range(layout.world_size)}
    position = dict.fromkeys(lists, 0)
    events: dict[Place, Event] = {}
    waiting: dict[Place, list[int]] = {}
    runnable = deque(lists)
    while runnable:
        rank = runnable.popleft()
        while position[rank] < len(lists[rank]):
            action = lists[rank][position[rank]]
            needs = list(feeds.needs(rank, action))
            missing = next((need for need in needs if need not in events), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            if position[rank]:
                needs.append((rank, lists[rank][position[rank] - 1]))
            cause = max(needs, key=lambda need: events[need].end, default=None)
            start = 0.0 if cause is None else events[cause].end
            takes = duration(rank, action) if action.kind in _COMPUTE else 0.0
            events[rank, action] = Event(rank, action, start, start + takes, cause)
            runnable.extend(waiting.pop((rank, action), ()))
            position[rank] += 1
    stuck = [
        f"rank {r} at {todo[position[r]]}" for r, todo in lists.items() if position[r] < len(todo)
    ]
    if stuck:
        raise RuntimeError(f"the schedule never ends: {', '.join(stuck)} waits for ever")
    order = {place: i for i, place in enumerate((r, a) for r in lists for a in lists[r])}
    return Timeline(dict(sorted(events.items(), key=lambda item: order[item[0]])))


class _Feeds:
    """Which actions of other ranks an action waits for."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # A rank with both ends of the bridge posts what it receives when it sends.
        self._both_ends = {
            rank
            for rank in range(layout.world_size)
            if layout.encoder is not None
            and role_of(layout, rank) == Role(encoder=layout.encoder.pp - 1, llm=0)
        }

    def needs(self, rank: int, action: Action) -> Iterator[Place]:
        """The actions that must have ended before this one can."""
        module, m = action.module, action.microbatch
        if action.kind is Kind.WAIT_INPUT:
            for other, of in self._neighbours(rank, module, -1):
                yield other, Action(Kind.SEND_OUTPUT, of, m)
        elif action.kind is Kind.WAIT_GRAD:
            for other, of in self._neighbours(rank, module, +1):
                yield other, Action(Kind.SEND_GRAD, of, m)
        elif action.kind is Kind.WAIT_SENT:
            for other, of in self._neighbours(rank, module, +1):
                if module is Module.ENCODER and of is Module.LLM and other in self._both_ends:
                    yield other, Action(Kind.SEND_OUTPUT, module, m)
                else:
                    yield other, Action(Kind.POST_INPUT, of, m)

    def _neighbours(self, rank: int, module: Module, step: int) -> Iterator[tuple[int, Module]]:
        """Ranks of the stage in front of (-1) or behind (+1) a rank's, and their module."""
        encoder, llm = self._layout.encoder, self._layout.llm
        grid = encoder if module is Module.ENCODER else llm
        assert grid is not None
        place = grid.coordinates(rank)
        stage = place.pp + step
        if 0 <= stage < grid.pp:
            yield grid.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=stage), module
        elif module is Module.ENCODER:
            for lane in self._layout.served(place.dp):
                for other in llm.stage_ranks(dp=lane, pp=0):
                    yield other, Module.LLM
        elif encoder is not None:
            for dp in self._layout.serving(place.dp):
                for other in encoder.stage_ranks(dp=dp, pp=encoder.pp - 1):
                    yield other, Module.ENCODER
