"""A folder of `nemotron_h_omni` as it is published: model, tokenizer, chat template, processor."""

import json
from pathlib import Path
from typing import Any

PATCH, BINS = 4, 16
TOKENS = ("<img>", "</img>", "<video>", "<so_embedding>", "<so_start>", "<so_end>")
FRAME_PATCHES = 16


def write_folder(folder: Path, pattern: str = "ME*-M") -> Any:
    """Write it; returns transformers' model, in evaluation mode."""
    from transformers import AutoTokenizer

    from tests.unit_tests.data.text.chats import OPENS, save_tokenizer, template
    from tests.unit_tests.model.omni.peer import AUDIO, write_omni

    folder.mkdir(parents=True)
    save_tokenizer("byte-level", str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    tokenizer.chat_template = template("chatml", marked=False) + OPENS
    assert AUDIO["num_mel_bins"] == BINS
    model = write_omni(folder, pattern, vision={"num_hidden_layers": 2}, text={"vocab_size": 448})
    image, audio = map(tokenizer.convert_tokens_to_ids, ("<image>", "<so_embedding>"))
    model.config.image_token_id = model.image_token_id = image
    model.config.audio_token_id = model.audio_token_id = audio
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision = model.config.vision_config
    mean, std = list(vision.norm_mean), list(vision.norm_std)
    name = "NemotronH_Omni_Reasoning_V3"
    processor = {
        "processor_class": f"{name}Processor",
        "image_processor": {
            "image_processor_type": f"{name}ImageProcessor",
            "patch_size": PATCH,
            "min_num_patches": 4,
            "max_num_patches": 64,
            "image_mean": mean,
            "image_std": std,
        },
        "video_processor": {
            "video_processor_type": f"{name}VideoProcessor",
            "patch_size": PATCH,
            "video_target_num_patches": FRAME_PATCHES,
            "norm_mean": mean,
            "norm_std": std,
            "do_sample_frames": True,
            "fps": 2,
        },
        "feature_extractor": {
            "feature_extractor_type": "ParakeetFeatureExtractor",
            "feature_size": BINS,
        },
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
    return model
