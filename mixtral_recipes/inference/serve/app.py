"""The web server: OpenAI's paths, who may call them, and answers whole or as they come."""

import asyncio
import dataclasses
import functools
import hmac
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mixtral_recipes.errors import DataError
from mixtral_recipes.inference import prompts
from mixtral_recipes.inference.batch import Continuation
from mixtral_recipes.inference.chat import answering, tokens_of
from mixtral_recipes.inference.sampling import Likelihood, Sampling
from mixtral_recipes.inference.serve import answers
from mixtral_recipes.inference.serve.access import is_loopback
from mixtral_recipes.inference.serve.requests import Body, Chat, Completion, Refused, new_tokens, parsed, refusal
from mixtral_recipes.inference.serve.worker import Ask, Grown, Ticket, Worker
from mixtral_recipes.inference.text import TokenTexts

_MOST_BYTES = 16 * 2**20  # of a body
_COMPLETION_TOKENS = 16  # where a completion does not say, as OpenAI has it

Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """Answers requests about one model."""

    def __init__(self, worker: Worker, tokenizer: Any, *, name: str, token: str | None, vocabulary: int) -> None:
        """Begin.

        Args:
            worker: Continues prompts.
            tokenizer: The model's.
            name: The model's, for clients.
            token: What a client must send; None lets everybody in who calls this machine by a name of its own.
            vocabulary: How many tokens there are.
        """
        self._worker = worker
        self._tokenizer = tokenizer
        self._name = name
        self._token = token
        self._vocabulary = vocabulary
        self._texts = TokenTexts(tokenizer)
        self._ends_of_answers = answering(Sampling(), tokenizer).stop
        self._born = int(time.time())
        self._tokenizing = asyncio.Lock()  # one at a time: a tokenizer keeps settings of the call before
        # A token stands for no more characters than its name has: of a longer text it is known unread, and without
        # keeping others from the tokenizer, that it has no room.
        self._most_characters = worker.context * max(map(len, tokenizer.get_vocab()))
        self._seen = worker.metrics

    def app(self) -> Starlette:
        """The web application."""
        handlers: dict[tuple[str, str], Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/healthz"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/models/{name:path}"): self._model,
            ("POST", "/v1/completions"): functools.partial(self._answer, Completion),
            ("POST", "/v1/chat/completions"): functools.partial(self._answer, Chat),
        }
        routes = [
            Route(path, self._guarded(path, handler), methods=[method]) for (method, path), handler in handlers.items()
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._no_such_path})

    def _guarded(self, path: str, handler: Handler) -> Handler:
        """A handler for those who may call it, whose errors are answers."""

        async def guarded(request: Request) -> Response:
            try:
                if handler != self._health:
                    self._admit(request)
                response = await handler(request)
            except Exception as error:
                told = refusal(error)
                headers = {"Retry-After": "1"} if told.status in (429, 503) else {}
                response = JSONResponse(answers.problem(told), told.status, headers)
            self._seen.requests.labels(path, response.status_code).inc()
            return response

        return guarded

    def _admit(self, request: Request) -> None:
        """Refuse who has no token; without one, who was led here by another site's page."""
        if self._token is None:
            try:
                host = request.url.hostname
            except ValueError as error:
                raise Refused(f"Host {request.headers['host']} is not a valid address ({error}).") from error
            if not is_loopback(str(host)):
                raise Refused(
                    f"Host {host} is not this machine's own name; start the server with --token-file to accept any "
                    "host name.",
                    status=403,
                )
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            raise Refused("Incorrect token.", status=401, code="invalid_api_key")

    async def _no_such_path(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = Refused(f"{request.method} {request.scope['path']} is not served.", status=error.status_code)
        return JSONResponse(answers.problem(told), told.status, error.headers)

    async def _health(self, request: Request) -> Response:
        ends = self._worker.draining
        return JSONResponse({"status": "draining" if ends else "ok"}, 503 if ends else 200)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._seen.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._know(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        born, context = self._born, self._worker.context
        return {
            "id": self._name, "object": "model", "created": born, "owned_by": "local", "max_model_len": context
        }  # fmt: skip

    def _know(self, name: str) -> None:
        if name != self._name:
            raise Refused(
                f"The model {name!r} does not exist; this server has {self._name!r}.",
                status=404, code="model_not_found", param="model",
            )  # fmt: skip

    async def _answer(self, kind: type[Body], request: Request) -> Response:
        """Continue what a request holds."""
        body = parsed(kind, await _bytes(request))
        self._know(body.model)
        asks = await self._asks(body)
        per_prompt = body.n or 1
        prompt_tokens = sum(len(ask.prompt) for ask in asks[::per_prompt])
        shape = answers.Shape(self._name, self._texts, chat=isinstance(body, Chat))
        reply = _Reply(self._worker, asks)
        if body.stream:
            usage = prompt_tokens if body.wants_usage else None
            return StreamingResponse(self._events(reply, shape, usage), media_type="text/event-stream")
        choices = await reply.whole(request)
        self._seen.seconds.observe(reply.seconds)
        return JSONResponse(shape.whole(choices, prompt_tokens))

    async def _asks(self, body: Body) -> list[Ask]:
        """A request's prompts, ``n`` times each, every one with random numbers of its own."""
        count = (len(body.prompts) if isinstance(body, Completion) else 1) * (body.n or 1)
        if count > self._worker.most:
            raise Refused(
                f"{count} answers were requested (prompts times n), but this server takes at most {self._worker.most} "
                "at a time: request fewer, or start it with a larger --queue."
            )
        async with self._tokenizing:
            encoded = await asyncio.to_thread(self._encoded, body)
        context, asks = self._worker.context, []
        for tokens in encoded:
            if isinstance(body, Chat):
                most = new_tokens(body.max_completion_tokens or body.max_tokens, len(tokens), context)
                likeliest = (body.top_logprobs or 0) if body.logprobs else None
            else:
                assert isinstance(body, Completion)
                most = new_tokens(body.max_tokens, len(tokens), context, otherwise=_COMPLETION_TOKENS)
                likeliest = body.logprobs
            how = body.sampling(most, likeliest)
            if isinstance(body, Chat):
                how = dataclasses.replace(how, stop=(*how.stop, *self._ends_of_answers))
            asks += [Ask(tokens, how, len(asks) + n, watched=bool(body.stream)) for n in range(body.n or 1)]
        return asks

    def _encoded(self, body: Body) -> list[list[int]]:
        param = "messages" if isinstance(body, Chat) else "prompt"
        try:
            if isinstance(body, Chat):
                self._refuse_longer(sum(len(turn["content"]) for turn in body.turns), param)
                found = [tokens_of(self._tokenizer, body.turns)]
            else:
                assert isinstance(body, Completion)
                self._refuse_longer(max((len(one) for one in body.prompts if isinstance(one, str)), default=0), param)
                found = [
                    prompts.tokens(self._tokenizer, one, chat=False) if isinstance(one, str) else one
                    for one in body.prompts
                ]
        except DataError as error:
            raise Refused(str(error), param=param) from error
        if not all(found):
            raise Refused("A prompt has no tokens; it must not be empty.", param=param)
        if max(map(max, found)) >= self._vocabulary:
            raise Refused(f"A prompt's tokens must be below {self._vocabulary}.", param=param)
        if max(body.logit_bias or [0]) >= self._vocabulary:
            raise Refused(f"logit_bias: its tokens must be below {self._vocabulary}.", param="logit_bias")
        return found

    def _refuse_longer(self, characters: int, param: str) -> None:
        if characters > self._most_characters:
            raise Refused(
                f"This model's maximum context length is {self._worker.context} tokens, but the request has "
                f"{characters:,} characters; the limit is {self._most_characters:,}.",
                code="context_length_exceeded",
                param=param,
            )

    async def _events(self, reply: "_Reply", shape: answers.Shape, prompt_tokens: int | None) -> AsyncIterator[str]:
        """Server-sent events; `prompt_tokens` None leaves out how many tokens there were."""
        spoken: set[int] = set()
        likely: defaultdict[int, list[Likelihood]] = defaultdict(list)  # of tokens whose text cannot be shown yet
        try:
            async for number, grown in reply.pieces():
                likely[number] += grown.likelihoods
                if grown.text or grown.done or number not in spoken:
                    reason = grown.done.finish_reason if grown.done else None
                    told = likely.pop(number)
                    yield _event(shape.piece(number, grown.text, reason, told, first=number not in spoken))
                    spoken.add(number)
            if prompt_tokens is not None:
                yield _event(shape.last(reply.choices, prompt_tokens))
            self._seen.seconds.observe(reply.seconds)
        except Exception as error:
            yield _event(answers.problem(refusal(error)))
        yield "data: [DONE]\n\n"


class _Reply:
    """What comes of a request; the worker's thread brings it, the web server's takes it."""

    def __init__(self, worker: Worker, asks: list[Ask]) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._come: asyncio.Queue[tuple[int, Grown] | Exception] = asyncio.Queue()
        self._done: dict[int, Continuation] = {}
        self._count = len(asks)
        self.ticket: Ticket = worker.submit(asks, self._bring, self._bring_failure)

    @property
    def choices(self) -> list[Continuation]:
        """The continuations that have ended, in their order."""
        return [self._done[number] for number in sorted(self._done)]

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return time.monotonic() - self.ticket.since

    async def pieces(self) -> AsyncIterator[tuple[int, Grown]]:
        """Text as it comes; a client that goes away takes its rows out of the batch."""
        try:
            while len(self._done) < self._count:
                come = await self._come.get()
                if isinstance(come, Exception):
                    raise come
                number, grown = come
                if grown.done:
                    self._done[number] = grown.done
                yield come
        finally:
            self._worker.give_up(self.ticket)

    async def whole(self, request: Request) -> list[Continuation]:
        """All continuations, unless the client goes away before."""
        work = asyncio.ensure_future(self._all())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _gone()
            return work.result()
        finally:
            gone.cancel()
            work.cancel()

    async def _all(self) -> list[Continuation]:
        async for _ in self.pieces():
            pass
        return self.choices

    def _bring(self, number: int, grown: Grown) -> None:
        self._loop.call_soon_threadsafe(self._come.put_nowait, (number, grown))

    def _bring_failure(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._come.put_nowait, error)


async def _bytes(request: Request) -> bytes:
    """A body, if it is JSON and not too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a browser sends to another site unasked is of another kind
        raise Refused("Content-Type must be application/json.", status=415)
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            if len(found) > _MOST_BYTES:
                raise Refused(f"A request may have at most {_MOST_BYTES} bytes.", status=413)
    except ClientDisconnect as error:
        raise _gone() from error
    return bytes(found)


def _gone() -> Refused:
    return Refused("The client went away.", status=499)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
