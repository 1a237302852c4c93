"""Requests are continued together, and what goes wrong with one ends no other."""

from typing import Any

import pytest
import torch

from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.inference.serve.requests import Refused
from mixtral_recipes.inference.serve.worker import Ask, Grown, Worker
from tests.unit.inference.serve.counting import Counting, Words


class Client:
    def __init__(self, server: Worker, *last: int, watches: bool = True) -> None:
        self.texts = [""] * len(last)
        self.calls = 0
        self.refused: list[Refused] = []
        self.server = server
        asks = [Ask([5, token], Sampling(6, temperature=1e-9), watched=watches) for token in last]
        self.ticket = server.submit(asks, self.told, self.failed)

    def told(self, number: int, grown: Grown) -> None:
        self.texts[number] += grown.text
        self.calls += 1

    def failed(self, error: Refused) -> None:
        self.refused.append(error)
        self.server.give_up(self.ticket)


def worker() -> Worker:
    model: Any = Counting(Words())
    return Worker(model, rows=4, context=50, most_waiting=4)


def test_who_does_not_watch_is_told_once() -> None:
    server = worker()
    one, other = Client(server, 40), Client(server, 40, watches=False)
    server.drain()
    server.run()
    assert one.texts == other.texts == [" 41 42 43 44 45 46"]
    assert (one.calls, other.calls) == (5, 1)  # the first two tokens come in one round


def test_a_row_that_fails_ends_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    server = worker()
    fine, no_numbers, broken = Client(server, 40), Client(server, 10, 60), Client(server, 29)
    server.drain()
    server.run()
    assert fine.texts == [" 41 42 43 44 45 46"]
    assert not fine.refused
    (told,) = no_numbers.refused
    assert (told.status, "after 5 tokens the logits are NaN or infinite" in str(told)) == (500, True)
    (told,) = broken.refused
    assert (told.status, str(told)) == (500, "The server could not answer (IndexError).")
    assert "IndexError: 31" in caplog.text  # with all that led to it
    assert server.metrics.totals() == {"continuations": 1, "prompt_tokens": 2, "completion_tokens": 6}


def test_a_pass_that_fails_ends_what_was_in_it_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    server = worker()
    clients = [Client(server, token) for token in (20, 21, 22, 75, 40)]  # the last one waits for a place
    server.drain()
    server.run()
    assert [len(client.refused) for client in clients] == [1, 1, 1, 1, 0]
    assert clients[-1].texts == [" 41 42 43 44 45 46"]
    assert caplog.text.count("RuntimeError: a kernel failed") == 1


def test_a_pass_that_fails_on_one_of_several_ranks_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_recipes.inference.serve.worker.rank_and_size", lambda: (0, 2))
    server = worker()
    clients = [Client(server, token) for token in (20, 75, 40, 50, 60)]
    with pytest.raises(RuntimeError, match="a kernel failed"):
        server.run()
    assert [str(error) for client in clients for error in client.refused] == ["The server has shut down."] * 5
    with pytest.raises(Refused, match="shutting down"):
        Client(server, 40)


@pytest.mark.parametrize(("device", "shape"), [("cpu", (4, 1)), ("cuda", (2, 4095))])
def test_room_is_made_for_the_longest_prompts_where_memory_is_a_gpus(device: str, shape: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    class Watching(Counting):
        def prompts(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
            seen.append(tokens.shape)
            return super().prompts(tokens, *others)

    model: Any = Watching(Words())
    model.device = torch.device(device)
    server = Worker(model, rows=4, context=4096, most_waiting=4)
    server.warm_up()
    assert seen == [shape]
    client = Client(server, 40)
    server.drain()
    server.run()
    assert client.texts == [" 41 42 43 44 45 46"]
