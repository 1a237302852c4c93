"""A process that serves: the web server in a thread, the model in the main one, and signals that end it cleanly."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.inference.serve.app import Service
from mixtral_recipes.inference.serve.worker import Worker
from mixtral_recipes.system.ranks import first, launched_rank

_GOODBYE_S = 10  # for answers to reach their clients


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        RecipeError: the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(1024)
    except OSError as error:
        raise RecipeError(f"--host {host} --port {port}: {error.strerror or error}; choose another.") from error
    return opened


def serve(
    model: InferenceModel,
    opened: socket.socket | None,
    *,
    name: str,
    token: str | None,
    rows: int,
    context: int,
    most_waiting: int,
    ready: Callable[[str], None],
) -> dict[str, int]:
    """Serve a model until a signal ends it; all ranks call it together.

    SIGTERM and Ctrl-C let the requests that were taken end; a second Ctrl-C does not.

    Args:
        model: The model.
        opened: The socket to listen on; None on all ranks but the first.
        name: The model's name for clients.
        token: What clients must send; None for nothing.
        rows: The most rows of a data-parallel rank.
        context: The most tokens of a row.
        most_waiting: The most rows that wait.
        ready: Called on rank 0 with the URL once requests are answered.

    Returns:
        How many prompts were continued, and the tokens of those; 0 on other ranks.
    """
    vocabulary = model.config.vocab_size
    if launched_rank() != 0:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # rank 0 says when it is over
    worker = Worker(model, rows=rows, context=context, most_waiting=most_waiting)
    worker.warm_up()
    if opened is None:
        first(lambda: None)
        worker.run()
        return worker.metrics.totals()
    service = Service(worker, model.tokenizer, name=name, token=token, vocabulary=vocabulary)
    with _ends(worker), _web(service, opened) as url:
        first(lambda: ready(url))
        worker.run()
    return worker.metrics.totals()


@contextlib.contextmanager
def _ends(worker: Worker) -> Iterator[None]:
    """Signals that end the work: the first lets requests end."""

    def asked(number: int, frame: Any) -> None:
        if worker.draining and number == signal.SIGINT:
            worker.stop()
        else:
            worker.drain()

    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():  # who asks a second time is not to kill what is about to end
            signal.signal(number, signal.SIG_IGN if worker.draining else handler)


@contextlib.contextmanager
def _web(service: Service, opened: socket.socket) -> Iterator[str]:
    """The web server, in a thread of its own; its URL."""
    settings = uvicorn.Config(
        service.app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_GOODBYE_S,
        server_header=False,
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, name="web", daemon=True)
    thread.start()
    host, port = opened.getsockname()[:2]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(_GOODBYE_S + 5)
