"""What the web server makes of odd requests, without a model."""

import asyncio
from typing import Any

import httpx
import pytest

from mixtral_recipes.data.records.chat_templates import CHATML
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.inference.serve.app import Service
from mixtral_recipes.inference.serve.requests import Chat, Completion, parsed
from mixtral_recipes.inference.serve.worker import Worker
from tests.unit.inference.serve.counting import VOCABULARY, Counting, Words


def answer_to(method: str, path: str, **named: Any) -> httpx.Response:
    model: Any = Counting(Words())
    worker = Worker(model, rows=4, context=50, most_waiting=4)
    app: Any = Service(worker, Words(), name="m", token=None, vocabulary=VOCABULARY).app()

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **named)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("[::1]", 200),
        ("127.8.8.8:80", 200),
        ("example.org", 403),
        ("127.0.0.1.example.org", 403),
    ],
)
def test_without_a_token_only_this_machine_is_answered(host: str, status: int) -> None:
    assert answer_to("GET", "/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere"])
def test_a_host_that_is_no_address(path: str) -> None:
    answer = answer_to("GET", path, headers={"host": "[::1"})
    assert answer.status_code == (400 if path == "/v1/models" else 404)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_which_methods_a_path_has_is_told() -> None:
    answer = answer_to("GET", "/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("many", [{"prompt": "a", "n": 9}, {"prompt": ["a"] * 3, "n": 3}, {"prompt": ["a"] * 900}])
def test_what_never_has_room_is_not_told_to_come_again(many: dict[str, Any]) -> None:
    answer = answer_to("POST", "/v1/completions", json={"model": "m"} | many)
    assert answer.status_code == 400
    assert "this server takes at most 8 at a time" in answer.text


def test_an_answer_in_a_conversation_stops_where_the_template_ends_it() -> None:
    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    tokenizer.chat_template = CHATML
    model: Any = Counting(tokenizer)
    worker = Worker(model, rows=4, context=500, most_waiting=4)
    service = Service(worker, tokenizer, name="m", token=None, vocabulary=len(tokenizer))
    asked = parsed(Chat, b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stop": "###"}')
    (ask,) = asyncio.run(service._asks(asked))
    assert ask.sampling.stop == ("###", "<|im_end|>")
    (ask,) = asyncio.run(service._asks(parsed(Completion, b'{"model": "m", "prompt": "Hi"}')))
    assert not ask.sampling.stop
