"""Frames of a video by their index, without decoding what lies between key frames where it may."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_mimo.media.container import Packet, decoded
from megatron_mimo.media.items import BrokenItemError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

# A jump reads and decodes from a key frame again: fewer frames than this are decoded faster.
_WORTH_A_JUMP = 4


class AstrayError(BrokenItemError):
    """A jump to a key frame ended behind the frame that was looked for."""


class Frames:
    """The frames of a track in the order in which they are shown.

    Args:
        container: File, just opened.
        track: Its track, whose decoder is set up.
        packets: All packets of the track that are shown.
        may_seek: Whether to jump over frames.
    """

    def __init__(
        self,
        container: "InputContainer",
        track: Any,
        packets: Sequence[Packet],
        *,
        may_seek: bool,
    ) -> None:
        self._container, self._track = container, track
        times = sorted(packet.at for packet in packets if packet.at is not None)
        # Time stamps name frames where each packet has one of its own; order does elsewhere.
        self._times = times if len(set(times)) == len(packets) else None
        keys = [packet.at for packet in packets if packet.is_key and packet.at is not None]
        self._keys = sorted(keys) if may_seek else []
        self._decoded = self._decode()
        self._shown = -1
        self._held: VideoFrame | None = None

    def at(self, index: int) -> "VideoFrame | None":
        """A frame, or None if it does not decode. Indices must rise from call to call.

        Raises:
            AstrayError: A jump passed it.
        """
        if self._times is None:
            return self._in_order(index)
        time = self._times[index]
        jumped = self._jump(time)
        while (frame := self._next()) is not None:
            if frame.pts is None or frame.pts < time:
                jumped = False
                continue
            if frame.pts == time:
                return frame
            if jumped:
                raise AstrayError("the file's key frames are not where it says")
            # Of a later index, perhaps of the next one that is asked for.
            self._held = frame
            return None
        return None

    def _in_order(self, index: int) -> "VideoFrame | None":
        while (frame := self._next()) is not None:
            self._shown += 1
            if self._shown == index:
                return frame
        return None

    def _next(self) -> "VideoFrame | None":
        held, self._held = self._held, None
        frame = held if held is not None else next(self._decoded, None)
        if frame is not None and frame.pts is not None and self._times is not None:
            self._shown = bisect_right(self._times, frame.pts) - 1
        return frame

    def _jump(self, time: int) -> bool:
        """Go to the last key frame before a time, if that spares enough frames."""
        assert self._times is not None
        at = bisect_right(self._keys, time) - 1
        if at < 0:
            return False
        key = self._keys[at]
        spared = bisect_right(self._times, key) - 1 - self._shown
        if spared <= _WORTH_A_JUMP:
            return False
        self._container.seek(key, stream=self._track)
        self._decoded, self._held = self._decode(), None
        return True

    def _decode(self) -> "Iterator[VideoFrame]":
        for packet in self._container.demux(self._track):
            # A packet that does not decode costs its own frame, and those that depend on it.
            yield from decoded(packet) or ()
