"""Flags of the commands that let a trained model answer."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from megatron_mimo.inference.sampling import Sampling
from megatron_mimo.settings import File, Folder, OnlyWith, Part, Switch, Within, check_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlags:
    """How a model is loaded.

    Attributes:
        device: Kind of device of the model; auto takes cuda where there is one.
        tokenizer_model: Folder of the tokenizer in place of the run's.
        custom_import: Python module that the run's --custom-import named, given again because it
            runs code.
        trust_checkpoint: Whether to run code that files of the checkpoint name; only for files
            whose author you trust.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokenizer_model: Folder = None
    custom_import: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="MODULE")] = ()
    trust_checkpoint: Switch = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Let a trained model answer a question.

    RUN is the folder that --save named, of which the newest checkpoint is taken, or the folder of
    one checkpoint; or a folder of transformers' NemotronH_Omni_Reasoning_V3. QUESTION is a text;
    without <image>, <video> or <audio> in it, such files are put in front of it.

    Attributes:
        image: Image file that the question is about; give it once for each image.
        video: Video file that the question is about; give it once for each video.
        audio: Audio file that the question is about; give it once for each clip.
        questions: JSON Lines file of questions in place of QUESTION: each line has "question", and
            paths from the file's folder as "image" or "images", "video" or "videos", "audio" or
            "audios". A line of JSON answers each.
        json: Whether to print JSON, once the answer is complete.
        sampling: How tokens are chosen.
        model: How the model is loaded.
    """

    image: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE")] = ()
    video: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE")] = ()
    audio: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE")] = ()
    questions: File = None
    json: Switch = False
    sampling: Part[Sampling] = field(default_factory=Sampling)
    model: Part[ModelFlags] = field(default_factory=ModelFlags)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """Talk with a trained model on a terminal, or in a browser.

    RUN is the folder that --save named, of which the newest checkpoint is taken, or the folder of
    one checkpoint; or a folder of transformers' NemotronH_Omni_Reasoning_V3. /help lists what can
    be typed beside questions.

    Attributes:
        image: Image file that the first question is about; give it once for each image.
        web: Whether to serve a page for browsers in place of the terminal.
        host: Address that the page listens at; 127.0.0.1 is for this machine alone, 0.0.0.0 for
            everybody who reaches it.
        port: Port that the page listens at; 0 takes a free one.
        sampling: How tokens are chosen.
        model: How the model is loaded.
    """

    image: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE")] = ()
    web: Switch = False
    host: Annotated[str, OnlyWith("--web")] = "127.0.0.1"
    port: Annotated[int, Within(0, 65_535), OnlyWith("--web")] = 7860
    sampling: Part[Sampling] = field(default_factory=Sampling)
    model: Part[ModelFlags] = field(default_factory=ModelFlags)

    def __post_init__(self) -> None:
        check_settings(self)
