"""What reaches the model's processor: the prompt, the padded picture, and models refused early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unit.odd_pictures import FILES
from vllm_flow.demo_model.heldout import build_prompt
from vllm_flow.eval.sweep.conversation import NAMES, ConversationError, choose
from vllm_flow.eval.sweep.engine_actor import Ask
from vllm_flow.eval.sweep.model_facts import (
    ModelError,
    check_ranks,
    class_token_obstacle,
    downsampling_obstacle,
    full_grid,
    read_facts,
)
from vllm_flow.eval.sweep.pictures import (
    PREPARATIONS,
    background_of,
    pad_to_square,
    preparation,
    prepare,
    read_pictures,
    unreadable,
)
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.pictures import PictureError


class Templated:
    """A processor whose chat template is a Python format."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(
        self, messages: list[Any], add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert add_generation_prompt and not tokenize
        (message,) = messages
        kinds = [part["type"] for part in message["content"]]
        assert kinds in (["image", "text"], ["text"])
        image = "<image>\n" if kinds[0] == "image" else ""
        return self.chat_template.format(image=image, text=message["content"][-1]["text"])


HUB_LLAVA = "USER: {image}{text} ASSISTANT:"
CHATML = "<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n"


def test_llava_is_asked_in_its_own_conversation() -> None:
    expected = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nIs it? ASSISTANT:"
    )
    for model, processor in (
        ("llava-hf/llava-1.5-7b-hf", Templated(None)),
        ("/models/mine", Templated(HUB_LLAVA)),
    ):
        found = choose("auto", model, processor)
        assert found.prompt("Is it?", image=True) == expected
        assert found.prompt("Is it?", image=False) == expected.replace("<image>\n", "")
        assert found.add_special_tokens


def test_other_models_are_asked_in_their_chat_template() -> None:
    found = choose("auto", "/models/other", Templated(CHATML))
    assert found.name == "chat-template" and not found.add_special_tokens
    assert found.prompt("a", image=True) == CHATML.format(image="<image>\n", text="a")
    assert found.prompt("a", image=False) == CHATML.format(image="", text="a")
    assert choose("chat-template", "llava-1.5", Templated(HUB_LLAVA)).name == "chat-template"
    assert choose("llava-1.5", "/models/other", Templated(CHATML)).name == "llava-1.5"
    with pytest.raises(ConversationError, match="has no chat template"):
        choose("auto", "/models/other", Templated(None))


def test_qwen_vl_is_asked_as_its_authors_did() -> None:
    """With the picture and the text alone; Qwen-VL-Chat in its chat template."""
    raw = Templated("{image}{text}".replace("{image}", "Picture 1: <img></img>\n"))
    found = choose("auto", "/models/mine", raw)
    assert (found.name, found.add_special_tokens) == ("qwen-vl", False)
    assert found.prompt("Is it? Answer:", image=True) == "<img></img>Is it? Answer:"
    assert found.prompt("Is it? Answer:", image=False) == "Is it? Answer:"
    assert choose("auto", "/models/mine", Templated(CHATML)).name == "chat-template"


def test_the_demo_model_is_asked_as_it_was_taught() -> None:
    facts = read_facts("demo-small")
    assert facts.conversation.prompt("Is it?", image=True) == build_prompt("Is it?")
    assert (facts.num_layers, facts.full_grid, facts.no_downsampling) == (6, 8, None)
    assert facts.all_attend


def test_a_model_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_facts(str(tmp_path))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_padding_centres_the_picture_on_the_mean_colour(width: int, height: int) -> None:
    picture = Image.new("RGB", (width, height), (255, 0, 0))
    square = pad_to_square(picture)
    side = max(width, height)
    assert square.size == (side, side)
    left, top = (side - width) // 2, (side - height) // 2
    assert square.crop((left, top, left + width, top + height)).tobytes() == picture.tobytes()
    colours = dict((colour, count) for count, colour in square.getcolors())
    assert colours.get((122, 116, 104), 0) == side * side - width * height


def test_preparations() -> None:
    picture = Image.new("RGB", (4, 2))
    assert prepare(picture, "plain") is picture
    assert prepare(picture, "pad").size == (4, 4)
    with pytest.raises(ValueError, match="'crop'"):
        prepare(picture, "crop")


def test_pictures_are_padded_where_llavas_conversation_is() -> None:
    """And left alone elsewhere: 640 x 480 padded is a third more tokens for a Qwen2-VL, all of the mean colour."""
    assert preparation("auto", "conversation", "llava-1.5") == "pad"
    for conversation in set(NAMES) - {"auto", "llava-1.5"}:
        assert preparation("auto", "conversation", conversation) == "plain"
        assert preparation("auto", "pad", conversation) == "pad", (
            "RefCOCO's boxes are of the square"
        )
    assert preparation("auto", "plain", "llava-1.5") == "plain"
    for asked in PREPARATIONS:
        assert preparation(asked, "conversation", "llava-1.5") == asked
        assert preparation(asked, "plain", "chat-template") == asked


def item(path: Path, preparation: str = "plain", reading: str = "server") -> dict[str, str]:
    return {"image": str(path), "preparation": preparation, "reading": reading}


@pytest.mark.parametrize("preparation", ["pad", "plain"])
@pytest.mark.parametrize("name", ["exif-6.jpeg", "RGBA.png", "p-transparent.png", "I16.png"])
def test_an_engine_is_handed_what_a_server_decodes(
    tmp_path: Path, name: str, preparation: str
) -> None:
    media = pytest.importorskip("vllm.multimodal.media.image")
    (tmp_path / name).write_bytes(FILES[name])
    for background in ((255, 255, 255), (9, 8, 7)):
        asked = item(tmp_path / name, preparation)
        (handed,) = read_pictures([asked], background).values()
        served = (
            media.ImageMediaIO(rgba_background_color=background).load_file(tmp_path / name).media
        )
        assert handed.tobytes() == prepare(served, preparation).tobytes()


def test_the_same_file_in_two_readings_is_two_pictures(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(FILES["exif-6-rgba.png"])
    asked = [item(path), item(path, reading="stored"), item(path)]
    server, stored = read_pictures(asked).values()
    assert (server.size, stored.size) == ((7, 13), (13, 7))
    policy = parse_policies("baseline", 4)[0]
    ids = {Ask(one, policy, None, None).picture_id for one in asked}
    assert len(ids) == 2, "vLLM would take one for the other"


def test_a_servers_background_is_the_engines() -> None:
    def media(colour: Any) -> dict[str, Any]:
        return {"media_io_kwargs": {"image": {"rgba_background_color": colour}}}

    assert background_of(media([1, 2, 3])) == (1, 2, 3)
    for none in ({}, {"media_io_kwargs": None}, {"media_io_kwargs": {"image": {}}}, media(None)):
        assert background_of(none) == (255, 255, 255)
    with pytest.raises(ValueError, match="'white' is no colour"):
        background_of(media("white"))


def test_an_unreadable_picture_is_named_once(tmp_path: Path) -> None:
    asked = item(tmp_path / "gone.png")
    (error,) = read_pictures([asked]).values()
    assert isinstance(error, PictureError)
    assert unreadable(asked, error).count("gone.png") == 1
    assert unreadable(asked, MemoryError("no")).startswith(
        f"image unreadable: {asked['image']}: Mem"
    )


def config(**vision: Any) -> Any:
    strategy = vision.pop("strategy", "default")
    architecture = vision.pop("architecture", "LlavaForConditionalGeneration")
    tower = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **vision}
    return SimpleNamespace(
        architectures=[architecture],
        vision_config=SimpleNamespace(**tower),
        vision_feature_select_strategy=strategy,
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"model_type": "siglip_vision_model", "strategy": "full"}, None),
        ({"architecture": "LlavaNextForConditionalGeneration"}, "no square of patches"),
        ({"model_type": "pixtral"}, "no learned positions"),
        ({"strategy": "full"}, "one image token for each patch"),
        ({"image_size": 384}, "do not fill"),
    ],
)
def test_which_models_take_reduced_pictures(changes: dict[str, Any], says: str | None) -> None:
    obstacle = downsampling_obstacle(config(**changes))
    assert (obstacle is None) if says is None else (says in obstacle)


def test_grids() -> None:
    assert full_grid(config()) == 24
    assert full_grid(config(image_size=384)) is None
    assert full_grid(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        (
            {"architecture": "Qwen2VLForConditionalGeneration"},
            "Qwen2VLForConditionalGeneration has none",
        ),
        ({"model_type": "siglip_vision_model"}, "siglip_vision_model. has none"),
        ({"strategy": "full"}, "'full' it is one of the image's tokens itself"),
        ({"architecture": "InternVLChatModel", "model_type": "x"}, None),
        ({"architecture": "SomebodyElse", "model_type": "x"}, None),
    ],
)
def test_ranks_by_a_class_token_that_is_not_there(
    changes: dict[str, Any], says: str | None
) -> None:
    """Refused before an engine starts where the configuration says so; else the engine says it."""
    facts = replace(
        read_facts("demo-small"), no_class_token=class_token_obstacle(config(**changes))
    )
    others = "baseline,cliff=2,0:50% uniform,0:50% received_attention,2:50% last_prompt"
    check_ranks(parse_policies(others, 6), facts, "m")
    with pytest.raises(ModelError, match="'dycoke' goes by the frames of a video, and questions"):
        check_ranks(parse_policies("baseline,dycoke", 6), facts, "m")
    for spec in ("0:50% cls_attention", "0:50% cls_diverse;4:0", "fastervlm"):
        asked = parse_policies(f"baseline,{spec}", 6)
        if says is None:
            check_ranks(asked, facts, "m")
            continue
        with pytest.raises(ModelError, match=says) as error:
            check_ranks(asked, facts, "m")
        assert asked[1].name in str(error.value) and "rank 'cls_" in str(error.value)
