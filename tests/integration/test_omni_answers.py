"""Questions on pictures, videos and clips: tokens, rows and answers are those of transformers."""

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.omni_folder import write_folder

QUESTION = "See <image>, watch <video> and hear <audio>, then say <image>?"
NEW = 8


def write_media(folder: Path) -> dict[str, list[str]]:
    """Files of two images, of a video of 8 frames a second, and of a clip."""
    import av
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(5)
    found: dict[str, list[str]] = {"image": [], "video": [], "audio": []}
    for number, (width, height) in enumerate([(37, 24), (16, 50)]):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        found["image"].append(str(path))
    path = folder / "clip.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((random.standard_normal(4321) * 3000).astype("<i2").tobytes())
    found["audio"].append(str(path))
    path = folder / "moves.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "bgr0"
        for _ in range(12):
            pixels = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    found["video"].append(str(path))
    return found


def theirs(folder: Path, files: dict[str, list[str]]) -> dict[str, Any]:
    """Tokens of transformers' processor, and what its model answers greedily."""
    import av
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoProcessor, AutoTokenizer, NemotronH_Omni_Reasoning_V3
    from transformers.video_utils import VideoMetadata

    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = NemotronH_Omni_Reasoning_V3.from_pretrained(folder).eval()
    images = [Image.open(path).convert("RGB") for path in files["image"]]
    with wave.open(files["audio"][0]) as file:
        samples = np.frombuffer(file.readframes(-1), "<i2").astype(np.float32) / 32768
    with av.open(files["video"][0]) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    metadata = VideoMetadata(total_num_frames=len(frames), fps=8.0, duration=len(frames) / 8)
    text = QUESTION.replace("<audio>", processor.audio_token)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    indices = processor.video_processor.sample_frames(metadata, fps=2)
    metadata.frames_indices = indices
    made = processor(
        text=[text],
        images=images,
        audio=[samples],
        videos=[frames[indices]],
        video_metadata=metadata,
        do_sample_frames=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        seen = list(
            model.get_image_features(
                made["pixel_values"], made["image_grid_hw"], return_dict=True
            ).pooler_output
        )
        groups = model.get_video_features(
            made["pixel_values_videos"], return_dict=True
        ).pooler_output
        heard = model.get_audio_features(
            made["input_features"], made["input_features_mask"], return_dict=True
        ).pooler_output
        # In the order of the text.
        rows = {"encoder": torch.cat([seen[0], *groups, seen[1]]), "audio": heard}
        ids, answer = made["input_ids"], []
        embeddings = model.get_input_embeddings()(ids)
        for name, token in (
            ("encoder", model.config.image_token_id),
            ("audio", model.config.audio_token_id),
        ):
            mask = (ids == token).unsqueeze(-1).expand_as(embeddings)
            embeddings = embeddings.masked_scatter(mask, rows[name])
        for _ in range(NEW):
            logits = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
            answer.append(int(logits[0, -1, : len(tokenizer)].argmax()))
            following = model.get_input_embeddings()(torch.tensor([[answer[-1]]]))
            embeddings = torch.cat([embeddings, following], dim=1)
    return {"tokens": ids[0].tolist(), "rows": rows, "answer": answer}


def ours(folder: Path, files: dict[str, list[str]]) -> dict[str, Any]:
    """The same of a model that was loaded in one process."""
    import torch

    from megatron_mimo.data import Turn
    from megatron_mimo.data.samples.question import encode_question
    from megatron_mimo.inference import load

    model = load(str(folder), device="cpu")
    given = {model.kind_of(noun): paths for noun, paths in files.items()}
    encoded = encode_question(
        [Turn("user", QUESTION)], model._read(given), model.run.data, model.run.tokenizer
    )
    rows, positions = model.rows(encoded)
    assert rows is not None and positions is not None
    tokens = torch.from_numpy(encoded.tokens)
    found = {
        module: rows[tokens[positions] == model.run.tokenizer.placeholder_ids[module]]
        for module in ("encoder", "audio")
    }
    answer = model.generate(QUESTION, items=given, max_new_tokens=NEW)
    return {"tokens": tokens.tolist(), "rows": found, "answer": list(answer.tokens)}


def both(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    write_folder(folder / "omni")
    files = write_media(folder)
    found = ours(folder / "omni", files)
    return found, theirs(folder / "omni", files)


def test_tokens_rows_and_answers_are_those_of_transformers(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    ((found, wanted),) = run_ranks(1, both, tmp_path, timeout=200)
    assert found["tokens"] == wanted["tokens"]
    for module, rows in wanted["rows"].items():
        assert found["rows"][module].shape == rows.shape
        scale = rows.abs().max().item()
        assert (found["rows"][module] - rows).abs().max().item() < 1e-5 * scale, module
    assert found["answer"] == wanted["answer"][: len(found["answer"])]
    assert len(found["answer"]) > 3


def pruned(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Answers about a video of which half of the rows is left out, and those of transformers."""
    import json
    from types import SimpleNamespace

    import av
    import numpy as np
    import torch
    from transformers import NemotronH_Omni_Reasoning_V3

    from megatron_mimo.data import Turn
    from megatron_mimo.data.samples.question import encode_question
    from megatron_mimo.inference import load

    write_folder(folder / "omni")
    config = json.loads((folder / "omni" / "config.json").read_text())
    config["video_pruning_rate"] = 0.5
    (folder / "omni" / "config.json").write_text(json.dumps(config))
    random, path = np.random.default_rng(6), folder / "square.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        for _ in range(16):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    model = load(str(folder / "omni"), device="cpu")
    given, question = {"video": [str(path)]}, "What moves in <video>?"
    encoded = encode_question(
        [Turn("user", question)], model._read(given), model.run.data, model.run.tokenizer
    )
    answer = model.generate(question, items=given, max_new_tokens=NEW)
    rows, _ = model.rows(encoded)
    assert rows is not None
    groups = len(encoded.items["encoder"][0].labels)  # type: ignore[attr-defined]
    assert groups > 2 and answer.prompt_tokens == len(encoded.tokens) - len(rows) // 2
    theirs = NemotronH_Omni_Reasoning_V3.from_pretrained(folder / "omni").eval()
    features = SimpleNamespace(pooler_output=(rows.unflatten(0, (groups, -1)),))
    ids, wanted = torch.from_numpy(encoded.tokens)[None], []
    with torch.no_grad():
        for _ in range(len(answer.tokens)):
            made = theirs(input_ids=ids, mm_encoder_outputs={"video": features}, use_cache=False)
            limit = model.run.tokenizer.num_tokens
            wanted.append(int(made.logits[0, -1, :limit].argmax()))
            ids = torch.cat([ids, torch.tensor([wanted[-1:]])], dim=1)
    return [(list(answer.tokens), wanted)]


def test_rows_of_a_video_are_left_out_as_transformers_leaves_them_out(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    (((found, wanted),),) = run_ranks(1, pruned, tmp_path, timeout=200)
    assert found == wanted and len(found) > 3
