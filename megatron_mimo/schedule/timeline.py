"""Start and end of each action of a step, given the durations of forwards and backwards.

Pure arithmetic over lists of actions: it draws schedules, judges what the executor achieves, and
proves that a schedule has no deadlock.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.schedule.actions import Action, Kind, Role
from megatron_mimo.topology import Layout, ModuleGridSpec, StageId

_COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
# (rank, action): what happens, and where.
Place = tuple[int, Action]


@dataclass(frozen=True, slots=True)
class Event:
    """One action of one rank, with its times in the unit of the durations.

    Attributes:
        rank: Global rank.
        action: Action of the schedule.
        start: Time at which everything that it needs is there.
        end: Time at which it is done.
        cause: Action that it waited for last: the previous one of its rank, or another rank's.
    """

    rank: int
    action: Action
    start: float
    end: float
    cause: Place | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step, in the unit of the durations.

    Attributes:
        events: Event of every action, rank by rank in the rank's order.
    """

    events: Mapping[Place, Event]

    @property
    def makespan(self) -> float:
        """Time from the start of the step to its end."""
        return max(event.end for event in self.events.values())

    def busy(self, rank: int) -> float:
        """Time during which a rank computes."""
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
    """Simulate a schedule in which only forwards and backwards take time.

    Args:
        layout: The grids of all modules.
        schedule: Actions of every role, from `build_schedule`.
        duration: Function that returns the time of a rank's forward or backward, in any unit.

    Raises:
        RuntimeError: The schedule never ends; the message names the ranks and actions that wait.
    """
    feeds = _Feeds(layout)
    lists = {rank: schedule[layout.stages_of(rank)] for rank in range(layout.world_size)}
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
    """Actions of other ranks that an action waits for."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._target = layout.target
        self._sources = {grid.name: grid for grid in layout.sources}

    def needs(self, rank: int, action: Action) -> Iterator[Place]:
        """The actions that must have ended before this one can."""
        module, m = action.module, action.microbatch
        if action.kind is Kind.WAIT_INPUT:
            for other, of in self._before(rank, module):
                yield other, Action(Kind.SEND_OUTPUT, of, m)
        elif action.kind is Kind.WAIT_GRAD:
            for other, of in self._behind(rank, module):
                yield other, Action(Kind.SEND_GRAD, of, m)
        elif action.kind is Kind.WAIT_SENT:
            for other, of in self._behind(rank, module):
                if of != module and self._holds_both_ends(other, module):
                    # Such a rank posts its receives together with its sends.
                    yield other, Action(Kind.SEND_OUTPUT, module, m)
                else:
                    yield other, Action(Kind.POST_INPUT, of, m)

    def _holds_both_ends(self, rank: int, source: str) -> bool:
        held = self._layout.stages_of(rank)
        ends = (StageId(source, self._sources[source].pp - 1), StageId(self._target.name, 0))
        return all(end in held for end in ends)

    def _before(self, rank: int, module: str) -> Iterator[tuple[int, str]]:
        """Ranks that feed a rank's stage of a module, and their module."""
        grid = self._layout.modules[module]
        place = grid.coordinates(rank)
        if place.pp:
            yield self._neighbour(grid, rank, -1), module
        elif grid is self._target:
            for name in self._sources:
                for dp in self._layout.runners(name, place.dp):
                    for other in self._layout.producers(name, dp):
                        yield other, name

    def _behind(self, rank: int, module: str) -> Iterator[tuple[int, str]]:
        """Ranks that a rank's stage of a module feeds, and their module."""
        grid = self._layout.modules[module]
        place = grid.coordinates(rank)
        if place.pp + 1 < grid.pp:
            yield self._neighbour(grid, rank, +1), module
        elif module in self._sources:
            for lane in self._layout.reached(module, place.dp):
                for other in self._layout.users(lane):
                    yield other, self._target.name

    def _neighbour(self, grid: ModuleGridSpec, rank: int, step: int) -> int:
        place = grid.coordinates(rank)
        return grid.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp + step)
