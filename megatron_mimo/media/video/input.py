"""Videos as items of a module that takes images: the implementation of `data.inputs.ItemInput`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_mimo.media.images.config import ImageConfig
from megatron_mimo.media.images.packing import PackedImages, pack_images
from megatron_mimo.media.items import ItemWords, Layout, MockItems, OneRunItems, Run
from megatron_mimo.media.video.clip import EncodedVideo
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.decode import (
    VideoShape,
    VideoSource,
    decode_or_black,
    examine_video,
)
from megatron_mimo.media.video.encode import encode_video
from megatron_mimo.media.video.endings import VIDEO_ENDINGS
from megatron_mimo.media.video.mock import check_mock_video, has_room, mock_video

_BETWEEN = "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInput(OneRunItems):
    """Videos that feed a module of images: each group of frames is written like one image.

    Attributes:
        config: Conversion of a video to patches and texts.
        placeholder: Placeholder of a video in stored samples and questions.
        tags: Texts before and after the rows of each group: those of the module's images.
        feeds: Name of the module of images that takes the videos; None where they are all that
            their module takes.
        images: Settings of that module's patches; needed where it takes videos alone.
        noun: Name of one video in messages, and of its field in stored samples.
        class_tokens: Number of tokens of the module before the patches of each group.
    """

    config: VideoConfig = field(default_factory=VideoConfig)
    placeholder: str = "<video>"
    tags: tuple[str, str] = ("<img>", "</img>")
    feeds: str | None = "encoder"
    images: ImageConfig | None = None
    noun: str = "video"
    class_tokens: int = 0

    @property
    def words(self) -> ItemWords:
        """Names of videos in messages and stored samples."""
        return ItemWords(
            noun=self.noun,
            article="an" if self.noun[0] in "aeiou" else "a",
            smaller="sample fewer frames of its videos",
        )

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of video files in stored samples, in lower case."""
        return VIDEO_ENDINGS

    @property
    def item_type(self) -> type[EncodedVideo]:
        """Type of the result of `encode`."""
        return EncodedVideo

    @property
    def packed_type(self) -> type[PackedImages]:
        """Type of what the module's own kind packs, videos included."""
        return PackedImages

    def texts(self, item: EncodedVideo) -> tuple[str, ...]:
        """The text before each group of frames."""
        return item.labels

    def layout(self, item: EncodedVideo) -> Layout:
        """The tags of a group of frames, and its rows between them."""
        before, after = self.tags
        rows = item.rows // len(item.labels)
        return tuple(piece for piece in (before, rows, after) if piece)

    def runs(self, item: EncodedVideo) -> tuple[Run, ...]:
        """A line for each group of frames: its text, and its rows."""
        layout = self.layout(item)
        return tuple(
            (f"{_BETWEEN if number else ''}{label}", layout)
            for number, label in enumerate(self.texts(item))
        )

    def lengths(self, item: EncodedVideo) -> tuple[int, ...]:
        """Number of tokens of each group of frames."""
        rows, columns = item.grid
        return (rows * columns + self.class_tokens,) * len(item.labels)

    def examine(self, source: VideoSource) -> VideoShape:
        """Shape of a video that appears complete, from the header and the packets of its file.

        Raises:
            BrokenItemError: The file is damaged, truncated or empty, has no video track, or has no
                frame rate although frames are sampled by it.
        """
        return examine_video(source, self.config)

    def encode(
        self, source: VideoSource, shape: VideoShape, *, with_content: bool
    ) -> tuple[EncodedVideo, str | None]:
        """Cut the frames of a video that are used into patches.

        Args:
            source: Contents of a video file, or frames, uint8 [n, H, W, 3].
            shape: Shape of the video, from `examine`.
            with_content: Whether to compute patches; otherwise nothing is decoded.

        Returns:
            The video, and the reason if black frames replace all of its frames.
        """
        if not with_content:
            return encode_video(None, shape, self.config), None
        frames, reason = decode_or_black(source, shape)
        return encode_video(frames, shape, self.config), reason

    def pack(self, items: Sequence[EncodedVideo], seeds: Sequence[int]) -> PackedImages | None:
        """Pack videos one after the other; None for no video.

        Args:
            items: Videos with patches, in manifest order.
            seeds: Seed of each video's augmentation.

        Raises:
            TypeError: The videos are packed with the images of a module.
        """
        if self.images is None:
            raise TypeError(f"videos are packed by the items of the module {self.feeds!r}")
        return pack_images(items, self.images, seeds)

    def without_augmentation(self) -> "VideoInput":
        """The same settings without augmentation, as evaluation reads."""
        if self.images is None:
            return self
        return replace(self, images=replace(self.images, position_crop=False))

    def mock(self, rng: np.random.Generator, room: int) -> MockItems | None:
        """A square that moves, and the question where to; None where there is no room for it.

        Args:
            rng: Random generator of all choices.
            room: Number of positions that the video, its tags and the texts may take.
        """
        if not has_room(room, self.config, "".join(self.tags)):
            return None
        frames, direction = mock_video(rng, room, self.config, "".join(self.tags))
        return MockItems(
            sources=(frames,), question=f"{self.placeholder}Direction?", answer=direction
        )

    def check_mock(self, room: int) -> None:
        """Refuse a sequence without room for the shortest mock video and its texts.

        Raises:
            ValueError: There is no room.
        """
        check_mock_video(room, self.config, "".join(self.tags))
