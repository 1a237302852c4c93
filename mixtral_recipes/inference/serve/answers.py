"""What a client gets, in OpenAI's shapes."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from mixtral_recipes.inference.batch import Continuation
from mixtral_recipes.inference.serve.requests import Refused


class Shape:
    """The answers to one request: whole, or piece by piece."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Continuation], prompt_tokens: int) -> dict[str, Any]:
        """All of an answer."""
        kind = "chat.completion" if self._chat else "text_completion"
        made = [self._choice(number, one) for number, one in enumerate(choices)]
        return self._head | {"object": kind, "choices": made, "usage": usage(choices, prompt_tokens)}

    def piece(self, number: int, text: str, reason: str | None, *, first: bool = False) -> dict[str, Any]:
        """A part of one choice's text."""
        choice: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if self._chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._head | {"object": self._piece, "choices": [choice]}

    def last(self, choices: Sequence[Continuation], prompt_tokens: int) -> dict[str, Any]:
        """What ends a stream whose client wants to know how many tokens there were."""
        return self._head | {"object": self._piece, "choices": [], "usage": usage(choices, prompt_tokens)}

    @property
    def _piece(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _choice(self, number: int, one: Continuation) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": one.text}} if self._chat else {"text": one.text}
        return {"index": number, "finish_reason": one.finish_reason, "logprobs": None} | said


def usage(choices: Sequence[Continuation], prompt_tokens: int) -> dict[str, int]:
    """How many tokens a request took."""
    new = sum(len(one.tokens) for one in choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}


def problem(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP's number and OpenAI's body of an error; of one of ours, no more than that there was one."""
    if not isinstance(error, Refused):
        text = f"The server could not answer ({type(error).__name__})."
        error = Refused(text, status=500, kind="server_error")
    body = {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}
    return error.status, {"error": body}
