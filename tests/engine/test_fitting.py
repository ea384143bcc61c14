"""What the front end makes of a request's policy in view of its prompt: settled keys, a salt, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from tests.engine.settings_with import settings_with
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end import incoming
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy

LAYERS = 32
SETTINGS = FlowSettings.read({}, EngineFacts(LAYERS))


def request(
    keys: dict[str, Any] | None, *images: tuple[int, int], text: int = 20, **more: Any
) -> Any:
    """A processed request with images at (offset, tokens) and text after the last one."""
    features = [
        MultiModalFeatureSpec(None, "image", f"picture {n}", PlaceholderRange(offset, length), "")
        for n, (offset, length) in enumerate(images)
    ]
    end = max((offset + length for offset, length in images), default=0)
    usual = {"prompt_token_ids": list(range(end + text)), "prompt_embeds": None, "resumable": False}
    return SimpleNamespace(
        cache_salt=None,
        sampling_params=SamplingParams(extra_args=keys),
        mm_features=features,
        **(usual | more),
    )


def settle(keys: dict[str, Any] | None, *images: tuple[int, int], **settings: Any) -> Any:
    """The keys that go on, and the salt."""
    found = settings_with(SETTINGS, **settings)
    sent = request(keys, *images)
    incoming.check_keys(sent.sampling_params.extra_args, found)
    incoming.settle(sent, found)
    return sent.sampling_params.extra_args, sent.cache_salt


IMAGE = (35, 576)


def test_a_preset_goes_on_as_stages() -> None:
    keys, salt = settle({"flow_preset": "horizon-192"}, IMAGE)
    assert keys == {"flow_stages": "0:71/144 diversity, 20:0"}
    assert settle(keys, IMAGE) == (keys, salt)
    assert settle({"flow_preset": "fastv"}, IMAGE)[0] == {
        "flow_cliff": 2,
        "flow_keep": "50%",
        "flow_rank": "last_prompt",
    }


def test_other_keys_go_on_as_they_were() -> None:
    keys, _ = settle(
        {"flow_cliff": 4, "theirs": "x", "flow_log_attention": [3]}, IMAGE, attention_log="x"
    )
    assert keys == {"flow_cliff": 4, "theirs": "x", "flow_log_attention": [3]}


@pytest.mark.parametrize(
    ("keys", "images"),
    [
        ({"flow_cliff": 4}, ()),
        ({"flow_cliff": LAYERS}, (IMAGE,)),
        ({"flow_cliff": 4, "flow_keep": 576, "flow_rank": "uniform"}, (IMAGE,)),
        ({"flow_cliff": [LAYERS, LAYERS]}, ((5, 9), (20, 9))),
        ({"flow_stages": "4:600 random, 9:590 uniform"}, (IMAGE,)),
    ],
)
def test_a_policy_that_evicts_nothing_does_not_go_on(keys: Any, images: Any) -> None:
    assert settle(keys, *images) == (None, None)


@pytest.mark.parametrize(
    "keys",
    [
        {"flow_cliff": [4, 5]},
        {"flow_cliff": [4]},
        {"flow_cliff": 4, "flow_keep": [3, "50%"], "flow_rank": "uniform"},
    ],
)
def test_a_list_is_for_as_many_images_as_it_has_values_also_where_there_are_none(keys: Any) -> None:
    with pytest.raises(PolicyError, match=r"values? and the prompt has 0 images; give one value"):
        settle(keys)


def test_every_policy_has_a_salt_of_its_own() -> None:
    sent = [
        {"flow_cliff": 4},
        {"flow_cliff": [4, 5]},
        {"flow_cliff": [5, 4]},
        {"flow_stages": "4:50% random"},
        {"flow_stages": "4:50% random", "flow_seed": 1},
        {"flow_stages": "4:50% uniform"},
        {"flow_stages": "4:49% uniform"},
        {"flow_stages": "4:50% uniform, 9:0"},
    ]
    images = ((5, 90), (120, 40))
    salts = [settle(keys, *images)[1] for keys in sent]
    assert len(set(salts)) == len(salts) and None not in salts
    assert (
        settle({"flow_cliff": 4, "flow_keep": "1/2", "flow_rank": "random"}, *images)[1] == salts[3]
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"flow_cliff": [3]}, "flow_cliff=[3]: it has 1 value and the prompt has 2 images"),
        (
            {"flow_cliff": 3, "flow_keep": [9, 9, 9], "flow_rank": "uniform"},
            "flow_keep=[9, 9, 9]: it has 3 values and the prompt has 2 images",
        ),
        (
            {"flow_stages": "2:30% uniform, 9:20 uniform"},
            "of an image of 40 tokens, stage '9:20 uniform' keeps 20 and '2:30% uniform' left 12",
        ),
        ({"flow_cliff": 3, "flow_keep": 9, "flow_rank": "last_image"}, "must see 90 tokens in one step"),
        ({"flow_preset": "fastv"}, "must see 175 tokens in one step"),
        (
            {"flow_stages": "2:30% uniform, 9:20% diversity", "flow_when": "decode"},
            "flow_when='decode': 'diversity' chooses while the image is computed",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_remedy(keys: Any, said: str) -> None:
    with pytest.raises(PolicyError) as error:
        settle(keys, (5, 90), (120, 40), step_tokens=80)
    assert said in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("images", "prompt"),
    [(((5, 30), (20, 40)), 80), (((5, 30), (5, 30)), 80), ((IMAGE,), 600), (((5, 40),), 3)],
)
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_pictures_in_one_another_or_nowhere_are_refused(
    images: Any, prompt: int, when: str
) -> None:
    tokens = list(range(prompt))
    sent = request({"flow_cliff": 4, "flow_when": when}, *images, prompt_token_ids=tokens)
    with pytest.raises(PolicyError, match="flow_cliff=4: one of its pictures is at tokens"):
        incoming.settle(sent, SETTINGS)
    sent = request(None, *images, prompt_token_ids=tokens)
    incoming.settle(sent, replace(SETTINGS, default_policy=parse_policy({"flow_cliff": 4}, LAYERS)))
    assert sent.sampling_params.extra_args is None  # for vLLM to refuse


def test_a_rank_by_place_needs_no_room() -> None:
    keys = {"flow_stages": "2:30% uniform, 9:10% random"}
    assert settle(keys, (5, 90), (120, 40), step_tokens=32)[1] is not None


def test_what_leaves_after_the_prefill_shares_what_has_no_policy() -> None:
    """Its salt is the client's, and its prompt may be of any shape: nothing leaves while it is computed."""
    late = {"flow_cliff": 3, "flow_when": "decode"}
    assert settle(late, (5, 90), step_tokens=32) == (late, None)
    sent = request(late, (5, 90), text=0)
    sent.cache_salt, sent.sampling_params.prompt_logprobs = "mine", 1
    incoming.settle(sent, SETTINGS)
    assert (sent.sampling_params.extra_args, sent.cache_salt) == (late, "mine")
    keys = {"flow_preset": "fastv", "flow_when": "decode"}
    assert settle(keys, (5, 90), step_tokens=2) == (
        {"flow_cliff": 2, "flow_keep": "50%", "flow_rank": "last_prompt", "flow_when": "decode"},
        None,
    )
    with pytest.raises(PolicyError, match="must see 2 tokens in one step"):
        settle(keys, (5, 90), step_tokens=1)
    with pytest.raises(PolicyError, match="flow_when='decode': this engine has a KV connector"):
        settle(late, (5, 90), connected=True)
    sent = request(late, (5, 90))
    sent.resumable = True
    with pytest.raises(PolicyError, match="streaming input"):
        incoming.settle(sent, SETTINGS)


@pytest.mark.parametrize("rank", ["diversity", "last_image"])
def test_single_tokens_cannot_be_logged_where_the_device_chooses(rank: str) -> None:
    log = {"flow_log_attention": [5], "flow_log_attention_heat": True}
    keys = {"flow_cliff": 3, "flow_keep": 9}
    with pytest.raises(PolicyError, match="flow_log_attention_heat=true: which image tokens stay"):
        settle({**keys, "flow_rank": rank, **log}, (5, 90), attention_log="x")
    assert settle({**keys, "flow_rank": "uniform", **log}, (5, 90), attention_log="x")[1]
    del log["flow_log_attention_heat"]
    assert settle({**keys, "flow_rank": rank, **log}, (5, 90), attention_log="x")[1]


def test_how_many_of_each_crop_stay_must_be_known_where_their_tokens_see_one_another() -> None:
    cropped = PlaceholderRange(5, 63, torch.tensor([True] * 30 + [False] * 3 + [True] * 30))
    mutual = settings_with(SETTINGS, mutual_pictures=True)

    def check(place: PlaceholderRange, settings: FlowSettings, **keys: Any) -> None:
        sent = request({"flow_cliff": 3, "flow_keep": 9, **keys}, (5, 63))
        sent.mm_features[0].mm_position = place
        incoming.settle(sent, settings)

    with pytest.raises(
        PolicyError, match="how many of each piece stay .* leave out do_pan_and_scan"
    ):
        check(cropped, mutual, flow_rank="diversity")
    check(cropped, SETTINGS, flow_rank="diversity")
    check(cropped, mutual, flow_rank="uniform")
    check(cropped, mutual, flow_rank="last_prompt", flow_when="decode")
    check(PlaceholderRange(5, 63), mutual, flow_rank="diversity")


EMBEDDED = {"prompt_token_ids": None, "prompt_embeds": object()}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"flow_cliff": 3}, "flow_cliff=3: a prompt given as embeddings does not say which"),
        ({"flow_log_attention": True}, "flow_log_attention=true: a prompt given as embeddings"),
    ],
)
def test_embeddings_have_no_pictures(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError) as error:
        incoming.settle(request(keys, **EMBEDDED), SETTINGS)
    assert said in str(error.value)


def test_embeddings_have_no_policy() -> None:
    baseline = request({"flow_cliff": LAYERS, "theirs": 1}, **EMBEDDED)
    incoming.settle(baseline, SETTINGS)
    assert baseline.sampling_params.extra_args == {"theirs": 1} and baseline.cache_salt is None
    sent = request(None, **EMBEDDED)
    incoming.settle(sent, replace(SETTINGS, default_policy=parse_policy({"flow_cliff": 3}, LAYERS)))
    assert sent.sampling_params.extra_args is None and sent.cache_salt is None


@pytest.mark.parametrize("rank", ["last_image", "last_prompt", "question", "raters"])
def test_keys_of_eight_bits_are_not_read(rank: str) -> None:
    keys = {"flow_stages": f"2:50% {rank}"}
    assert settle(keys, IMAGE)[1]
    with pytest.raises(PolicyError, match=f"rank '{rank}' reads keys, .* rank by 'uniform' or"):
        settle(keys, IMAGE, quantised_keys=True)
    for others in ("2:0", "2:50% uniform", "0:50% diversity, 3:10 random", "2:9 dart, 3:7 feather"):
        assert settle({"flow_stages": others}, IMAGE, quantised_keys=True)[1]


def test_blocks_of_a_request_that_evicts_are_not_sent() -> None:
    keys = {"flow_cliff": 3, "kv_transfer_params": {"do_remote_decode": True}}
    with pytest.raises(PolicyError, match="leave out kv_transfer_params"):
        settle(keys, IMAGE, connected=True)
    assert settle(keys, IMAGE)[1]  # nobody there who would send them
    assert settle({**keys, "flow_cliff": LAYERS}, IMAGE, connected=True)[1] is None
    default = parse_policy({"flow_cliff": 3}, LAYERS)
    del keys["flow_cliff"]
    assert settle(keys, IMAGE, connected=True, default_policy=default) == (keys, None)


def test_blocks_of_an_earlier_turn_are_not_read_back() -> None:
    """A prefill may ask the decode of the turn before for so many tokens, by NIXL for one."""
    asked = {"do_remote_decode": True, "remote_block_ids": [[1], [2]]}
    keys = {"flow_cliff": 3, "kv_transfer_params": asked}
    with pytest.raises(PolicyError, match="an earlier turn's, .* leave out remote_block_ids"):
        settle(keys, IMAGE, connected=True, hands_over=True)
    for blocks in (None, [], ()):  # a router's template has the key all the same
        asked["remote_block_ids"] = blocks
        assert settle(keys, IMAGE, connected=True, hands_over=True)[1]
