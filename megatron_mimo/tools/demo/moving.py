"""A video as a picture that moves, which every browser shows whatever codec the file has."""

import io

from PIL import Image

from megatron_mimo.tools.cards import Picture


def animated(content: bytes) -> Picture:
    """The frames of a video as an animated PNG that repeats for ever.

    Args:
        content: Contents of a video file at a constant frame rate.
    """
    # Not needed by those who run the demo of pictures.
    import av

    with av.open(io.BytesIO(content), "r") as file:
        rate = file.streams.video[0].average_rate
        frames = [Image.fromarray(f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
    assert rate is not None, "a video without a frame rate"
    png = io.BytesIO()
    frames[0].save(
        png,
        "PNG",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / rate),
        loop=0,
    )
    return Picture(content=png.getvalue(), media_type="image/png")
