"""Files of sound and moving pictures: their packets, read by FFmpeg through PyAV without decoding.

A *container* is such a file, a *packet* the compressed data of one frame of pictures or of some
hundred samples of sound. Reading all packets costs a small part of decoding them, and tells what a
header may not: whether the file is complete, and how long it is.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from megatron_mimo.border import reason_of
from megatron_mimo.media.items import BrokenItemError

if TYPE_CHECKING:
    from av.container import InputContainer

Medium = Literal["audio", "video"]

# Formats by their names in FFmpeg. Others are not tried: playlists among them name further files.
_FORMATS = "wav,w64,aiff,au,caf,flac,mp3,aac,ogg,mov,matroska,avi,flv,mpegts,mpeg,asf"
_BUFFER = 1 << 18  # bytes
# Files with more tracks than this are not meant to be played.
_MOST_TRACKS = 64
# Formats without a header, whose length FFmpeg estimates, unless one of these marks begins them.
_WITHOUT_HEADER = ("mp3", "aac")
_MARKS = (b"Xing", b"Info", b"VBRI")
# How much earlier than its header says the packets of a complete file may end, in seconds: time
# stamps are rounded, and headers count what a codec needs to begin. Beside it, frames of pictures
# may have no duration.
_SLACK = 0.1
# The head of a table of MP4 with the sizes of samples: name, version and flags. One size may be
# that of all.
_SIZES = b"stsz" + bytes(4)
# Sizes of the samples of a WAV file that was written to a pipe, whose length was not known.
_PIPED = 0x7FFFF000


@dataclass(frozen=True, kw_only=True, slots=True)
class Packet:
    """What one packet says of itself, in units of the track's time base.

    Attributes:
        at: Presentation time; None where the container stores none.
        lasts: Duration; 0 if unknown.
        is_key: Whether decoding can begin with it.
    """

    at: int | None
    lasts: int
    is_key: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """All packets of one track of a file that appears complete.

    Attributes:
        packets: Packets that are to be shown or heard, in the order of the file.
        promised: Duration that the header states, in units of the track's time base; None if it
            states none or FFmpeg estimated it.
        end: End of the last packet, in units of the track's time base; 0 without time stamps.
    """

    packets: tuple[Packet, ...]
    promised: int | None
    end: int


@contextmanager
def opened(data: bytes, medium: Medium, what: str) -> Iterator["tuple[InputContainer, Any]"]:
    """A file and its first track of a medium; whatever FFmpeg raises inside is a broken item.

    Args:
        data: Contents of the file.
        medium: Medium of the track.
        what: Name of the file in messages: "clip".

    Raises:
        BrokenItemError: The file is damaged, of no known format, or has no such track; or the block
            raised an error.
    """
    with _container(data, what) as container:
        tracks = getattr(container.streams, medium)
        if not tracks:
            raise BrokenItemError(f"{what} of {len(data)} bytes has no {medium} track")
        if tracks[0].codec_context is None:
            raise BrokenItemError(f"{what} of {len(data)} bytes is of no known codec")
        yield container, tracks[0]


def format_of(data: bytes, what: str) -> str:
    """FFmpeg's name of the format of a file.

    Args:
        data: Contents of the file.
        what: Name of the file in messages.

    Raises:
        BrokenItemError: The file is damaged, or of no known format.
    """
    with _container(data, what) as container:
        return container.format.name


@contextmanager
def _container(data: bytes, what: str) -> Iterator["InputContainer"]:
    _require_plausible_table(data, what)
    # Imported here: only processes that read such files pay for loading FFmpeg.
    import av

    options = {"format_whitelist": _FORMATS, "max_streams": str(_MOST_TRACKS)}
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        # FFmpeg would look for DTS in 5 MB of samples.
        options["probesize"] = "32768"
    try:
        with av.open(io.BytesIO(data), buffer_size=_BUFFER, container_options=options) as container:
            yield cast("InputContainer", container)
        return
    except BrokenItemError:
        raise
    except (av.error.ArgumentError, av.error.InvalidDataError):
        reason = "damaged, or of no known format"
    except av.error.EOFError:
        reason = "the file ends too early"
    # FFmpeg's wrappers raise nearly anything on broken bytes.
    except Exception as error:
        reason = reason_of(error)
    raise BrokenItemError(f"{what} of {len(data)} bytes does not decode: {reason}")


def decoded(packet: Any) -> list[Any] | None:
    """The frames that a packet completes; None if it does not decode."""
    import av

    try:
        return list(packet.decode())
    except av.error.FFmpegError:
        return None


def scan(container: "InputContainer", track: Any, data: bytes, what: str) -> Scan:
    """Read the packets of a track.

    Args:
        container: File, just opened.
        track: One of its tracks.
        data: Contents of the file.
        what: Name of the file in messages.

    Raises:
        BrokenItemError: The file is truncated.
    """
    packets: list[Packet] = []
    end, ends = 0, 0.0
    is_wav = container.format.name == "wav"
    if is_wav:
        _require_whole_wav(data, what)
    has_mark = False
    for packet in container.demux():
        if not packet.size:
            continue
        # FFmpeg marks the last packet of every WAV file of unknown length.
        if packet.is_corrupt and not is_wav:
            raise BrokenItemError(f"{what} of {len(data)} bytes is truncated within a packet")
        at, lasts = packet.pts, packet.duration or 0
        until = 0 if at is None else at + lasts
        ends = max(ends, float(until * packet.time_base))
        if packet.stream_index != track.index:
            continue
        if not packets:
            has_mark = any(mark in data[: packet.pos or 0] for mark in _MARKS)
        end = max(end, until)
        if not packet.is_discard:
            packets.append(Packet(at=at, lasts=lasts, is_key=packet.is_keyframe))
    if not packets:
        raise BrokenItemError(f"{what} of {len(data)} bytes has an empty track")
    rate = getattr(track, "average_rate", None)
    slack = _SLACK + (2 / float(rate) if rate else 0)
    estimated = container.format.name in _WITHOUT_HEADER and not has_mark
    promised = None if estimated else track.duration
    if promised is not None:
        stated, held = float(promised * track.time_base), float(end * track.time_base)
    elif container.duration and not estimated:
        stated, held = container.duration / 1_000_000, ends
    else:
        stated = held = 0.0
    # Without any time stamp the packets say nothing.
    if held and held < stated - slack:
        raise BrokenItemError(
            f"{what} of {len(data)} bytes is truncated: it holds {held:.2f} of the {stated:.2f} "
            f"seconds of its header"
        )
    return Scan(packets=tuple(packets), promised=promised, end=end)


def _require_plausible_table(data: bytes, what: str) -> None:
    """Refuse MP4 files with a table of more samples than there are bytes.

    FFmpeg makes room for every sample that a header names, some gigabytes for a few bytes of it.
    """
    at = -1
    while (at := data.find(_SIZES, at + 1)) >= 0:
        size, number = struct.unpack_from(">II", data[at + 8 : at + 16].ljust(8, b"\0"))
        if size * number > len(data):
            raise BrokenItemError(
                f"{what} of {len(data)} bytes is damaged: its header promises {number} samples of "
                f"{size} bytes"
            )


def _require_whole_wav(data: bytes, what: str) -> None:
    """Refuse a WAV file whose samples are fewer than its header says; FFmpeg takes what is there.

    The chunk of samples is the last one that is looked at; headers of 64 bits are left to FFmpeg.
    """
    at = 12
    while data[:4] == b"RIFF" and at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            held = len(data) - at - 8
            if held < size < _PIPED:
                raise BrokenItemError(
                    f"{what} of {len(data)} bytes is truncated: it holds {held} of the {size} "
                    f"bytes of samples of its header"
                )
            return
        at += 8 + size + size % 2
