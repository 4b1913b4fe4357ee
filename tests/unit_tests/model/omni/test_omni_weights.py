"""Import and export of omni folders: exact, strict, and each rank what it owns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.model.omni.peer import random_samples, theirs_of, write_omni
from tests.unit_tests.modules.radio.peer import difference


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    apart = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(apart, file, metadata={"format": "pt"})


def changed(one: Path, other: Path) -> list[str]:
    """Tensors that are not the same bit by bit in two folders, whatever their files."""
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(one) as before, WeightFolder(other) as after:
        both = before.names & after.names
        return sorted(before.names ^ after.names) + [
            name
            for name in sorted(both)
            if before.dtype(name) != after.dtype(name)
            or not before.tensor(name).equal(after.tensor(name))
        ]


def round_trip(folder: Path, dtype: str | None) -> tuple[list[str], bool]:
    """What a load and a save change; whether transformers' logits are the same."""
    import torch
    from transformers import NemotronH_Omni_Reasoning_V3

    import megatron_mimo

    model = megatron_mimo.load_pretrained(
        folder / "in", dtype=None if dtype is None else getattr(torch, dtype), device="cpu"
    )
    model.save_pretrained(folder / "out")
    ids, labels, images = random_samples()
    logits = []
    for name in ("in", "out"):
        theirs, info = NemotronH_Omni_Reasoning_V3.from_pretrained(
            folder / name, output_loading_info=True, dtype=torch.float32
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            logits.append(theirs_of(theirs.eval(), ids, labels, images).logits)
    return changed(folder / "in", folder / "out"), logits[0].equal(logits[1])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_round_trip_is_exact(
    run_ranks: Callable[..., list], tmp_path: Path, dtype: str | None
) -> None:
    write_omni(tmp_path / "in", "ME*-", vision={"layerscale_value": 0.3})
    beside = {"tokenizer.json": "{}", "chat_template.jinja": "x", "generation_config.json": "{}"}
    for name, text in beside.items():
        (tmp_path / "in" / name).write_text(text)
    assert run_ranks(1, round_trip, tmp_path, dtype) == [([], True)]
    for name in (*beside, "config.json"):
        before, after = ((tmp_path / at / name).read_text() for at in ("in", "out"))
        assert (json.loads(before) == json.loads(after)) if "json" in name else before == after


def mixed_dtypes(folder: Path) -> tuple[list[str], bool]:
    """What changes in a bfloat16 folder with some float32 weights; whether the model is close."""
    import torch

    import megatron_mimo

    write_omni(folder / "in", "ME*")

    def shorten(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not name.endswith(("A_log", ".D", "correction_bias")):
                tensors[name] = tensor.bfloat16()

    edit_weights(folder / "in", shorten)
    model = megatron_mimo.load_pretrained(folder / "in", device="cpu")
    assert model.language.embedding.word_embeddings.weight.dtype == torch.bfloat16
    model.save_pretrained(folder / "out")
    batch = random_samples()
    wide = megatron_mimo.load_pretrained(folder / "in", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        near = abs(float(model.loss(*batch) / wide.loss(*batch)) - 1) < 0.1
    return changed(folder / "in", folder / "out"), near


def test_dtypes_stay_as_they_are(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    assert run_ranks(1, mixed_dtypes, tmp_path) == [([], True)]


def in_place(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """What saving over the folder itself changes, twice, after several files and an index."""
    import megatron_mimo
    from megatron_mimo.weights.folder import WeightFolder, write_folder

    write_omni(folder / "one", "M*")
    with WeightFolder(folder / "one") as one:
        tensors = {name: one.tensor(name) for name in one.names}
        write_folder(folder / "many", one.config, tensors, file_bytes=50_000)
    files = sorted(path.name for path in (folder / "many").iterdir())
    model = megatron_mimo.load_pretrained(folder / "many", device="cpu")
    model.save_pretrained(folder / "many")
    model.save_pretrained(folder / "many")
    after = sorted(path.name for path in (folder / "many").iterdir())
    return files, after, changed(folder / "one", folder / "many")


def test_several_files_and_saving_in_place(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    ((files, after, differing),) = run_ranks(1, in_place, tmp_path)
    assert len(files) > 4 and files[1] == f"model-00001-of-{len(files) - 2:05}.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    assert after == ["config.json", "model.safetensors"]
    assert differing == []


def without_source(folder: Path) -> tuple[float, set[str], set[str]]:
    """Difference of transformers' logits when nothing is carried over; what it missed."""
    import torch
    from transformers import NemotronH_Omni_Reasoning_V3

    import megatron_mimo
    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.model.omni.parts import ALL
    from megatron_mimo.model.omni.weights import save_omni
    from megatron_mimo.weights.folder import WeightFolder

    write_omni(folder / "in", "ME*-")
    model = megatron_mimo.load_pretrained(folder / "in", device="cpu")
    save_omni(
        folder / "out",
        model.config,
        vision=model.vision.vit,
        projector=model.projector,
        language=model.language,
        source=None,
    )
    theirs, info = NemotronH_Omni_Reasoning_V3.from_pretrained(
        folder / "out", output_loading_info=True
    )
    again = read_omni(WeightFolder(folder / "out"), ALL)
    assert again == model.config
    ids, labels, images = random_samples()
    with torch.no_grad():
        found = theirs_of(theirs.eval(), ids, labels, images).logits
        # A still video is an image.
        (image,) = images[1:2]
        vision = theirs.vision_model
        frames = torch.cat([image, image])[None]
        assert difference(vision(frames).features, vision(image[None]).features) < 1e-5
        return (
            difference(found, model.logits(ids, images)),
            set(info["missing_keys"]),
            set(info["unexpected_keys"]),
        )


def test_export_without_a_source(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    ((found, missing, unexpected),) = run_ranks(1, without_source, tmp_path)
    assert found < 1e-5
    assert not missing and not unexpected


def load_error(folder: Path) -> str:
    """The message of a load that must fail."""
    import megatron_mimo

    with pytest.raises(ValueError) as caught:
        megatron_mimo.load_pretrained(folder, device="cpu")
    return str(caught.value)


def test_missing_and_unexpected_weights_of_all_modules_are_listed(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    write_omni(tmp_path, "ME")
    expert = "language_model.backbone.layers.1.mixer.experts"

    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{expert}.8.up_proj.weight"] = tensors.pop(f"{expert}.7.up_proj.weight")
        tensors["mlp1.1.bias"] = tensors.pop("mlp1.3.weight")
        tensors["vision_model.radio_model.model.blocks.3.norm1.bias"] = tensors["mlp1.0.weight"]
        tensors["depth_model.weight"] = tensors["mlp1.0.weight"]

    edit_weights(tmp_path, change)
    (message,) = run_ranks(1, load_error, tmp_path)
    assert f"2 missing: {expert}.7.up_proj.weight, mlp1.3.weight; 4 unexpected: " in message
    assert message.endswith(
        f"depth_model.weight, {expert}.8.up_proj.weight, mlp1.1.bias, "
        f"vision_model.radio_model.model.blocks.3.norm1.bias"
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vision_model.radio_model.model.blocks.0.attn.qkv.weight", "[191, 64]"),
        ("mlp1.1.weight", "[39, 256]"),
        ("language_model.backbone.layers.0.mixer.k_proj.weight", "[32, 32] + [15, 32] + [16, 32]"),
    ],
)
def test_other_shapes_are_named(
    run_ranks: Callable[..., list], tmp_path: Path, name: str, found: str
) -> None:
    write_omni(tmp_path, "*", audio=False)
    edit_weights(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    (message,) = run_ranks(1, load_error, tmp_path)
    assert name in message
    assert f"has shape {found}, but the architecture of its config.json gives" in message


def set_field(section: str | None, field: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        (config[section] if section else config)[field] = value

    return change


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "model_type", "llava", "a model of type 'llava': expected 'nemotron_h_omni'"),
        (None, "vision_config", None, "config.json has no vision_config"),
        (None, "downsample_ratio", 1.0, "downsample_ratio is 1.0, only 0.5 is supported"),
        (None, "vision_hidden_size", 32, "vision_hidden_size is 32, only 64 is supported"),
        (None, "image_token_id", None, "image_token_id is None, expected a token from 0 to 63"),
        (None, "image_token_id", 64, "image_token_id is 64, expected a token from 0 to 63"),
        (None, "quantization_config", {}, "quantization_config is there"),
        ("text_config", "mlp_bias", True, "config.json: text_config: mlp_bias is True, only False"),
        ("text_config", "num_nextn_predict_layers", 1, "num_nextn_predict_layers is 1, only 0"),
        ("vision_config", "use_swiglu_ffn", True, "vision_config: use_swiglu_ffn is True, only"),
        ("vision_config", "hidden_act", "silu", "vision_config: hidden_act is 'silu': expected"),
    ],
)
def test_other_architectures_are_refused(
    run_ranks: Callable[..., list],
    tmp_path: Path,
    section: str | None,
    field: str,
    value: object,
    message: str,
) -> None:
    write_omni(tmp_path, "*", audio=False)
    edit_config(tmp_path, set_field(section, field, value))
    assert message in run_ranks(1, load_error, tmp_path)[0]


def test_a_final_norm_is_refused(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    write_omni(tmp_path, "*", audio=False)
    norm = "vision_model.radio_model.model.norm.weight"
    edit_weights(tmp_path, lambda tensors: tensors.update({norm: tensors["mlp1.0.weight"][:64]}))
    assert "have a norm after the vision encoder" in run_ranks(1, load_error, tmp_path)[0]


def as_published(config: dict[str, Any]) -> None:
    """Names of fields before transformers had the model."""
    names = {
        "image_token_id": "img_context_token_id",
        "text_config": "llm_config",
        "vision_hidden_size": "vit_hidden_size",
        "audio_config": "sound_config",
    }
    for name, older in names.items():
        config[older] = config.pop(name)


def older_names(folder: Path) -> tuple[bool, list[str]]:
    """Whether a model is the same by older names of fields; what a round trip changes."""
    import megatron_mimo

    write_omni(folder / "in", "M*")
    batch = random_samples()
    wanted = megatron_mimo.load_pretrained(folder / "in", device="cpu").loss(*batch)
    edit_config(folder / "in", as_published)
    edit_weights(
        folder / "in",
        # As in folders of old; transformers leaves it to the image processor.
        lambda tensors: tensors.update(
            {
                "vision_model.radio_model.input_conditioner.norm_mean": tensors["mlp1.0.weight"][:3]
                .sigmoid()
                .view(3, 1, 1)
            }
        ),
    )
    (folder / "in" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "patch_size": 4,
                "norm_mean": [0.48145466, 0.4578275, 0.40821073],
                "min_num_patches": 16,
                # Rows of an image and a little text: a bound like max_num_patches.
                "max_model_len": 104,
            }
        )
    )
    model = megatron_mimo.load_pretrained(folder / "in", device="cpu")
    images = model.config.image_config()
    assert (images.grid_rule, images.min_patches, images.max_patches) == ("nemotron-omni", 16, 400)
    model.save_pretrained(folder / "out")
    return model.loss(*batch).equal(wanted), changed(folder / "in", folder / "out")


def test_older_folders(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    assert run_ranks(1, older_names, tmp_path) == [(True, [])]


def pixels(folder: Path, name: str, content: dict[str, Any]) -> tuple[Any, Any]:
    """Mean and deviation that a file of the processor gives."""
    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.weights.folder import WeightFolder

    (folder / name).write_text(json.dumps(content))
    with WeightFolder(folder) as weights:
        vision = read_omni(weights).model.part("vision")
    return vision.pixel_mean, vision.pixel_std


def processors(folder: Path) -> list[Any]:
    """Of several files over each other, the one that transformers would take last."""
    write_omni(folder, "*", audio=False, vision={"norm_mean": [0.1, 0.2, 0.3]})
    plain = {"image_mean": [0.5, 0.25, 0.5], "image_std": 0.5, "patch_size": 4}
    nested = {"image_processor": {"do_normalize": False, "patch_size": 4}}
    found = [
        pixels(folder, "generation_config.json", {}),
        pixels(folder, "preprocessor_config.json", plain),
        pixels(folder, "processor_config.json", nested),
    ]
    with pytest.raises(ValueError, match="image processor: patch_size is 16, only 4 is supported"):
        pixels(folder, "processor_config.json", {"image_processor": {"patch_size": 16}})
    return found


def test_the_image_processor_says_how_pixels_are_normalised(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    (found,) = run_ranks(1, processors, tmp_path)
    assert found == [
        ((0.1, 0.2, 0.3), (0.26862954, 0.26130258, 0.27577711)),
        ((0.5, 0.25, 0.5), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ]


def shards(folder: Path, encoder: dict[str, int], llm: dict[str, int]) -> dict[str, Any]:
    """What a rank read and holds: elements read and owned, and weights that are wrong."""
    import torch

    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.model.omni.parts import ALL, projector_table
    from megatron_mimo.model.omni.weights import Places, describe_carried, load_omni
    from megatron_mimo.modules.adapter import BuildContext
    from megatron_mimo.modules.families import adapter_of
    from megatron_mimo.modules.hybrid import weights as language
    from megatron_mimo.modules.radio import weights as radio
    from megatron_mimo.runtime import seed_everything
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology
    from megatron_mimo.weights.folder import WeightFolder
    from megatron_mimo.weights.names import table_name
    from megatron_mimo.weights.shards import is_expert, take_shard

    read: list[int] = []

    class Counting(WeightFolder):
        def tensor(self, name: str) -> torch.Tensor:
            found = super().tensor(name)
            read.append(found.numel())
            return found

        def span(self, name: str, *where: int) -> torch.Tensor:
            found = super().span(name, *where)
            read.append(found.numel())
            return found

    first = ModuleGridSpec(name="encoder", **encoder)
    second = ModuleGridSpec(name="llm", offset=first.size, **llm)
    topology = build_topology(Layout.of(first, second, world_size=first.size + second.size))
    seed_everything(1, tp_rank=0, pp_rank=0, dp_rank=0)
    wrong, owned = [], 0
    with Counting(folder) as weights:
        config = read_omni(weights, ALL)
        read.clear()
        held_encoder, held_language, places = None, None, Places()
        modules: list[Any] = []

        def built(module: str) -> Any:
            context = BuildContext(
                pg_collection=topology.modules[module].pg_collection,
                params_dtype=torch.float32,
                row_width=config.model.row_width,
                vocab_size=config.vocab_size,
                seq_length=64,
                sequence_parallel=second.tp > 1,
            )
            architecture = config.model.modules[module]
            return adapter_of(architecture).build(architecture, context)

        if "encoder" in topology.modules:
            groups = topology.modules["encoder"]
            held_encoder = built("encoder")
            places = Places(tp=(groups.place.tp, first.tp))
            vision = held_encoder.vision
            names = radio.PUBLISHED
            modules.append(
                (
                    "vision_model.",
                    vision,
                    radio.name_table(config.model.part("vision"), names),
                    lambda name: table_name(vision, name),
                )
            )
            if held_encoder.projector is not None:
                modules.append(("mlp1.", held_encoder.projector, projector_table(), str))
        if topology.target is not None:
            groups = topology.target
            held_language = built("llm")
            place = groups.place
            places = Places(
                tp=(place.tp, second.tp),
                expt_tp=(place.expt_tp, second.expt_tp),
                first_expert=place.ep * held_language.experts_per_rank,
            )
            model = held_language.model
            modules.append(
                (
                    "language_model.",
                    model,
                    language.name_table(config.model.part("language")),
                    lambda name: table_name(model, name, first_expert=places.first_expert),
                )
            )
        for module in (held_encoder, held_language):
            for parameter in [] if module is None else module.parameters():
                torch.nn.init.constant_(parameter, torch.nan)
        carried = load_omni(
            weights,
            encoder=held_encoder,
            language=held_language,
            without=ALL,
            encoder_place=places,
            language_place=places,
        )
        elements = sum(read)
        for prefix, module, table, name_of in modules:
            entries = {entry.ours: entry for entry in table}
            for name, parameter in module.named_parameters():
                entry = entries[name_of(name)]
                whole = entry.join([weights.tensor(prefix + part) for part in entry.theirs])
                rank, size = places.expt_tp if is_expert(parameter) else places.tp
                wanted = take_shard(whole, parameter, tp_rank=rank, tp_size=size)
                owned += parameter.numel()
                if not parameter.equal(wanted):
                    wrong.append(prefix + name)
    return {"wrong": wrong, "read": elements, "owned": owned, "said": describe_carried(carried)}


@pytest.mark.parametrize(
    ("encoder", "llm"),
    [
        ({"tp": 2}, {"tp": 2}),
        ({"pp": 3}, {"pp": 2}),
        ({"tp": 1}, {"dp": 2, "ep": 2}),
        ({"tp": 2}, {"tp": 2, "ep": 2}),
        ({"tp": 2}, {"tp": 2, "expt_tp": 2}),
    ],
    ids=str,
)
def test_each_rank_reads_its_shard(
    run_ranks: Callable[..., list], tmp_path: Path, encoder: dict[str, int], llm: dict[str, int]
) -> None:
    write_omni(tmp_path, "ME*-ME")
    world = sum(
        sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", 1) for sizes in (encoder, llm)
    )
    for found in run_ranks(world, shards, tmp_path, encoder, llm):
        assert found["wrong"] == [] and found["owned"] > 0
        # A few small tensors more: scales, the buffer of a router, and sums of class tokens.
        assert found["owned"] <= found["read"] < 1.05 * found["owned"]
        assert found["said"] == (
            "not trained, carried over unchanged: audio (47 tensors) and video (1 tensors)"
        )
