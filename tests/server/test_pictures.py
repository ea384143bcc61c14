"""A refused request leaves nothing behind that another one meets: pictures and names of pictures.

The server's cache holds three pictures, so all of this happens as on a server that has run for long.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.requests import CHAT, chat_body, data_url, different_pictures, picture_of
from tests.server.serving import Server

START = 70
"""Of the questions; their pictures are other tests' no longer."""
REFUSALS: dict[str, dict[str, Any]] = {
    "by vLLM": {"logit_bias": {"9999999": 1}},
    "by the policy": {"vllm_xargs": {"flow_cliff": [2, 3]}},
    "after rendering": {"max_tokens": 100_000},
    "by the key": {"vllm_xargs": {"flow_cliff": -1}},
    "as it is sent": {"kv_transfer_params": {"a": "\ud800"}},
}


def asking(picture: Image.Image | None, name: str | None = None, **more: Any) -> dict[str, Any]:
    """A question about a picture, by name if it has one, by name alone if there is no picture."""
    body = copy.deepcopy(chat_body(START, max_tokens=4))
    part: dict[str, Any] = {"type": "image_url", "image_url": None}
    if picture is not None:
        part["image_url"] = {"url": data_url(picture)}
    if name is not None:
        part["uuid"] = name
    body["messages"][0]["content"][0] = part
    return {**body, "return_token_ids": True, **more}


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def refuse(server: Server, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()  # httpx could not send half a surrogate pair either
    answer = server.client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    # vLLM 0.32 itself calls what it cannot hand to its engine a server error.
    assert answer.status_code == (500 if "kv_transfer_params" in body else 400), answer.text


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return different_pictures(START, 8)


@pytest.mark.parametrize("why", REFUSALS)
def test_pictures_of_others_are_still_known(
    small: Server, pictures: list[Image.Image], why: str
) -> None:
    """The order of eviction is that of the requests which were served."""
    first, second, third, fourth, *_ = pictures
    known = tokens(small.post(CHAT, asking(first)))
    for picture in (second, third):
        tokens(small.post(CHAT, asking(picture)))
    refuse(small, asking(third, **REFUSALS[why]))
    tokens(small.post(CHAT, asking(fourth)))
    assert tokens(small.post(CHAT, asking(first))) == known


@pytest.mark.parametrize("why", REFUSALS)
def test_a_refused_picture_that_nobody_had_sent(small: Server, why: str) -> None:
    new = picture_of(chat_picture(list(REFUSALS).index(why)))
    for _ in range(2):
        refuse(small, asking(new, **REFUSALS[why]))
    first = tokens(small.post(CHAT, asking(new)))
    assert tokens(small.post(CHAT, asking(new))) == first


def chat_picture(number: int) -> Any:
    """The path of a picture that no other test of this file sends."""
    from tests.server.requests import questions

    paths = list(dict.fromkeys(asked.image_path for asked in questions()))
    return paths[-1 - number]


@pytest.mark.parametrize("why", REFUSALS)
def test_a_name_outlives_refused_requests(
    small: Server, pictures: list[Image.Image], why: str
) -> None:
    """Also those of another client, with the same picture and with many others."""
    name = f"pic-{why}"
    known = tokens(small.post(CHAT, asking(pictures[4], name)))
    refuse(small, asking(pictures[4], name, **REFUSALS[why]))
    assert tokens(small.post(CHAT, asking(None, name))) == known
    for picture in pictures:
        refuse(small, asking(picture, **REFUSALS[why]))
    assert tokens(small.post(CHAT, asking(None, name))) == known


@pytest.mark.parametrize("why", REFUSALS)
def test_a_refused_request_names_nothing(
    small: Server, pictures: list[Image.Image], why: str
) -> None:
    """Else its picture would be the answer to somebody who uses the name later."""
    name = f"refused-{why}"
    refuse(small, asking(pictures[5], name, **REFUSALS[why]))
    answer = small.post(CHAT, asking(None, name))
    assert answer.status_code == 400 and "Cache miss" in answer.text
    right = tokens(small.post(CHAT, asking(pictures[6], name)))
    assert right == tokens(small.post(CHAT, asking(pictures[6])))
