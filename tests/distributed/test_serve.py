"""``serve`` as clients meet it: OpenAI's client, many at once, those that go away, those that err, and the end."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mixtral_recipes import embedded

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}Answer:"
QUESTION = "Question: Where is Paris?"
TOKEN = "a-secret"


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def client(self, token: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key=token, max_retries=0, timeout=240)

    def count(self, name: str, **headers: str) -> float:
        text = httpx.get(self.url.removesuffix("/v1") + "/metrics", headers=headers).text
        (line,) = (line for line in text.splitlines() if line.startswith(f"mixtral_recipes_{name} "))
        return float(line.split()[1])


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    words = [sys.executable, "-m", "mixtral_recipes.cli.main", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said: list[str] = []
    assert process.stderr is not None
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("http://"):
                break
        else:
            raise AssertionError("".join(said))
        yield Server(process, said[-1].split()[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "chatty"
    shutil.copytree(embedded.resolve("embedded://mixtral_tiny"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving(model) as found:
        yield found


def use(server: Server, work: Callable[[Any], Awaitable[Any]], token: str = "none") -> Any:
    async def run() -> Any:
        async with server.client(token) as client:
            return await work(client)

    return asyncio.run(run())


async def said(client: Any, prompt: Any = QUESTION, **options: Any) -> str:
    settings = {"model": "chatty", "max_tokens": 12, "temperature": 0} | options
    return (await client.completions.create(prompt=prompt, **settings)).choices[0].text


def test_completion_chat_and_streams(server: Server) -> None:
    async def work(client: Any) -> None:
        assert [one.id async for one in client.models.list()] == ["chatty"]
        whole = await client.completions.create(model="chatty", prompt=QUESTION, max_tokens=12, temperature=0)
        assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (12, "length")
        stream = await client.completions.create(
            model="chatty", prompt=QUESTION, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        pieces = [piece async for piece in stream]
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
        assert pieces[-2].choices[0].finish_reason == "length"
        assert pieces[-1].usage == whole.usage
        short = {"model": "chatty", "prompt": QUESTION, "max_tokens": 2, "temperature": 0}  # both come in one round
        pieces = [piece.choices[0].text async for piece in await client.completions.create(**short, stream=True)]
        assert "".join(pieces) == await said(client, max_tokens=2)
        stop = whole.choices[0].text[5:8]
        assert await said(client, stop=stop) == whole.choices[0].text.partition(stop)[0]
        both = await client.completions.create(model="chatty", prompt=[QUESTION, "The"], max_tokens=12, temperature=0)
        assert [one.text for one in both.choices] == [whole.choices[0].text, await said(client, "The")]

        talk = {"model": "chatty", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        drawn = [await client.chat.completions.create(**talk, seed=5, n=2) for _ in range(2)]
        answers = [[one.message.content for one in answer.choices] for answer in drawn]
        assert answers[0] == answers[1]
        assert answers[0][0] != answers[0][1]
        stream = await client.chat.completions.create(**talk, seed=5, n=2, stream=True)
        texts = ["", ""]
        async for piece in stream:
            texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
        assert texts == answers[0]
        alone = await client.chat.completions.create(**talk, seed=5)
        assert alone.choices[0].message.content == answers[0][0]

    use(server, work)


async def likelihoods(client: Any) -> list[list[float]]:
    settings = {"model": "chatty", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    answer = await client.completions.create(prompt=[QUESTION, "The"], **settings)
    return [one.logprobs.token_logprobs for one in answer.choices]


def test_likelihoods_are_those_of_transformers_on_the_whole_text(server: Server, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    async def work(client: Any) -> None:
        asked = {"model": "chatty", "prompt": QUESTION, "max_tokens": 6, "temperature": 0, "logprobs": 3}
        answer = await client.completions.create(**asked)
        (choice,) = answer.choices
        told = choice.logprobs
        assert "".join(told.tokens) == choice.text
        assert told.text_offset == [len("".join(told.tokens[:place])) for place in range(6)]
        tokenizer = AutoTokenizer.from_pretrained(model)
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        prompt = tokenizer(QUESTION)["input_ids"]
        tokens = [*prompt, *tokenizer(choice.text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            known = theirs(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = known.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(told.token_logprobs), expected, atol=1e-3, rtol=1e-3)
        best = torch.tensor([sorted(one.values(), reverse=True) for one in told.top_logprobs])
        torch.testing.assert_close(best, known.topk(3).values, atol=1e-3, rtol=1e-3)
        pieces = [piece async for piece in await client.completions.create(**asked, stream=True)]
        streamed = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs]
        assert [token for one in streamed for token in one.tokens] == told.tokens
        assert [place for one in streamed for place in one.text_offset] == told.text_offset
        assert (await client.completions.create(**(asked | {"logprobs": None}))).choices[0].logprobs is None

        talk = {"model": "chatty", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
        (choice,) = (await client.chat.completions.create(**talk, logprobs=True, top_logprobs=2)).choices
        content = choice.logprobs.content
        assert "".join(one.token for one in content) == choice.message.content
        assert [one.logprob for one in content] == [one.top_logprobs[0].logprob for one in content]
        assert bytes(byte for one in content for byte in one.bytes).decode() == choice.message.content
        never = tokenizer(choice.message.content, add_special_tokens=False)["input_ids"][0]
        other = await client.chat.completions.create(**talk, logit_bias={str(never): -100})
        assert other.choices[0].message.content != choice.message.content

    use(server, work)


def resident(server: Server) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fifty_at_once_say_what_each_says_alone_in_the_same_memory(server: Server) -> None:
    async def everyone(client: Any) -> list[str]:
        return await asyncio.gather(
            *(said(client, f"Question {n}:", seed=n, temperature=0.8, max_tokens=24) for n in range(50))
        )

    first = use(server, everyone)
    before = resident(server)
    assert use(server, everyone) == use(server, everyone) == first
    assert resident(server) - before < 32 * 2**20
    alone = use(server, lambda client: said(client, "Question 7:", seed=7, temperature=0.8, max_tokens=24))
    assert alone == first[7]


def test_who_goes_away_leaves_the_batch(server: Server) -> None:
    gone = server.count("rows_cancelled_total")

    async def work(client: Any) -> None:
        async def listens_once(number: int) -> None:
            stream = await client.completions.create(
                model="chatty", prompt=[number + 5], max_tokens=500, stream=True, temperature=2
            )
            async for _ in stream:
                break
            await stream.close()

        waiting = [asyncio.ensure_future(said(client, [9], max_tokens=500, temperature=2)) for _ in range(10)]
        await asyncio.gather(*map(listens_once, range(10)))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    use(server, work)
    for _ in range(600):
        if server.count("rows_running") == server.count("rows_waiting") == 0:
            break
        asyncio.run(asyncio.sleep(0.1))
    assert server.count("rows_running") == server.count("rows_waiting") == 0
    assert server.count("rows_cancelled_total") > gone


def test_who_goes_away_before_all_was_asked_is_no_failure_of_the_server(server: Server) -> None:
    url, path = httpx.URL(server.url), "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(head.encode() + b'{"model":')
        asyncio.run(asyncio.sleep(0.2))
    counted, text = f'mixtral_recipes_requests_total{{path="{path}",status="%s"}}', ""
    for _ in range(600):
        text = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
        if counted % 499 in text or counted % 500 in text:
            break
        asyncio.run(asyncio.sleep(0.1))
    assert counted % 499 in text


BAD = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"prompt":"a"}', b'{"model":"chatty"}',
    b'{"model":"chatty","prompt":1}', b'{"model":"chatty","prompt":[]}', b'{"model":"chatty","prompt":[-1]}',
    b'{"model":"chatty","prompt":[99999]}', b'{"model":"chatty","prompt":"a","max_tokens":0}',
    b'{"model":"chatty","prompt":"a","max_tokens":511}', b'{"model":"chatty","prompt":"a","temperature":-1}',
    b'{"model":"chatty","prompt":"a","top_p":2}', b'{"model":"chatty","prompt":"a","n":1000000}',
    b'{"model":"chatty","prompt":"a","stop":""}', b'{"model":"chatty","prompt":"a","seed":1e400}',
    b'{"model":"chatty","prompt":"a","logprobs":30}', b'{"model":"chatty","prompt":"a","what":1}',
    b'{"model":"chatty","prompt":"' + b"a b " * 2000 + b'"}', b'{"model":"chatty","prompt":"\\ud800"}',
]  # fmt: skip


def test_a_bad_request_is_told_so_and_ends_nothing(server: Server) -> None:
    json = {"content-type": "application/json"}
    with httpx.Client() as client:
        for body in BAD:
            answer = client.post(server.url + "/completions", content=body, headers=json)
            assert answer.status_code == 400, body[:60]
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        for odd in (b'"temperature":1e-300', b'"top_p":5e-324'):
            body = b'{"model":"chatty","prompt":"a","max_tokens":3,' + odd + b"}"
            assert client.post(server.url + "/completions", content=body, headers=json).status_code == 200
        for bias, status in ((b"5", 200), (b"99999", 400)):
            for asked, path in ((b'"prompt":"a"', ""), (b'"messages":[{"role":"user","content":"a"}]', "/chat")):
                body = b'{"model":"chatty","max_tokens":1,"logit_bias":{"' + bias + b'":1},' + asked + b"}"
                answer = client.post(f"{server.url}{path}/completions", content=body, headers=json)
                assert answer.status_code == status, answer.text
        assert client.post(server.url + "/completions", content=b'{"model":"x","prompt":"a"}', headers=json).json()[
            "error"
        ]["code"] == "model_not_found"  # fmt: skip
        assert client.post(server.url + "/completions", content=b"{}").status_code == 415
        long = b'{"model":"chatty","prompt":"' + b"x" * (2**24 - 99) + b'"}'
        refused = client.post(server.url + "/completions", content=long, headers=json)
        assert (refused.status_code, "characters; the limit is" in refused.text) == (400, True)
        too_much = b'{"model":"' + b"a" * 2**24 + b'"}'
        assert client.post(server.url + "/completions", content=too_much, headers=json).status_code == 413
        assert client.get(server.url + "/nowhere").json()["error"]["message"] == "GET /v1/nowhere is not served."
        assert client.get(server.url + "/completions").status_code == 405
        assert client.get(server.url + "/models", headers={"host": "example.org"}).status_code == 403
    assert use(server, said)
    assert server.process.poll() is None


def test_two_ranks_a_token_a_full_queue_and_a_draining_end(model: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    options = ("--devices", "2", "--token-file", str(tmp_path / "token"), "--batch-size", "1", "--queue", "1")
    with serving(model, *options) as both:
        for path in ("/health", "/healthz"):
            assert httpx.get(both.url.removesuffix("/v1") + path).json() == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError):
            use(both, said)
        assert use(both, said, TOKEN) == use(server, said)
        told = [use(one, likelihoods, token) for one, token in ((both, TOKEN), (server, "none"))]
        assert [len(one) for one in told[0]] == [8, 8]
        assert told[0] == [pytest.approx(one, abs=1e-3) for one in told[1]]

        async def flood(client: Any) -> list[Any]:
            return await asyncio.gather(
                *(said(client, [n + 5], max_tokens=60) for n in range(9)), return_exceptions=True
            )

        found = use(both, flood, TOKEN)
        assert sum(isinstance(one, openai.RateLimitError) for one in found) >= 1
        assert {type(one) for one in found} == {str, openai.RateLimitError}

        async def end(client: Any) -> str:
            stream = await client.completions.create(
                model="chatty", prompt=QUESTION, max_tokens=12, temperature=0, stream=True
            )
            text = ""
            async for piece in stream:
                if not text:
                    both.process.send_signal(signal.SIGTERM)
                text += piece.choices[0].text
            return text

        assert use(both, end, TOKEN) == use(server, said)


def test_without_a_token_other_machines_are_not_let_in(model: Path) -> None:
    words = [sys.executable, "-m", "mixtral_recipes.cli.main", "serve", str(model), "--host", "0.0.0.0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "needs a token" in done.stderr


def test_what_vllm_would_be_called_with(model: Path) -> None:
    words = [sys.executable, "-m", "mixtral_recipes.cli.main", "serve", str(model), "--engine", "vllm"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.startswith(f"vllm serve {model} --host 127.0.0.1 --port 8000 --served-model-name chatty")
    hub = subprocess.run([*words[:4], "hf://org/big", "--exec"], capture_output=True, text=True, check=False,
        timeout=120, env=os.environ | {"PATH": "/nowhere"},
    )  # fmt: skip
    assert (hub.returncode, "pip install vllm" in hub.stderr) == (2, True)
