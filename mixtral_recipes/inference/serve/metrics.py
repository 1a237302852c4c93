"""What a server counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mixtral_recipes.inference.batch import Continuation

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        where = {"registry": self.registry, "namespace": "mixtral_recipes"}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **where)
        self.refused = Counter("requests_refused", "Requests refused because too many were waiting", **where)
        self.cancelled = Counter("rows_cancelled", "Rows whose client disconnected", **where)
        self.running = Gauge("rows_running", "Rows in the batch", **where)
        self.waiting = Gauge("rows_waiting", "Rows waiting for a place in the batch", **where)
        self.rows = Counter("rows", "Finished continuations", **where)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of answered prompts", **where)
        self.new_tokens = Counter("completion_tokens", "Tokens of finished continuations", **where)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request to its first token", buckets=_SECONDS, **where
        )
        self.seconds = Histogram("request_seconds", "From a request to its last token", buckets=_SECONDS, **where)

    def ended(self, continuation: Continuation) -> None:
        """A row is through."""
        self.rows.inc()
        self.prompt_tokens.inc(continuation.prompt_tokens)
        self.new_tokens.inc(len(continuation.tokens))

    def totals(self) -> dict[str, int]:
        """What was done in all."""
        names = {"continuations": "rows", "prompt_tokens": "prompt_tokens", "completion_tokens": "completion_tokens"}
        found = {name: self.registry.get_sample_value(f"mixtral_recipes_{of}_total") for name, of in names.items()}
        return {name: int(value or 0) for name, value in found.items()}

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
