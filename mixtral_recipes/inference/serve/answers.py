"""What a client gets, in OpenAI's shapes."""

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mixtral_recipes.inference.batch import Continuation
from mixtral_recipes.inference.sampling import Likelihood
from mixtral_recipes.inference.serve.requests import Refused
from mixtral_recipes.inference.text import TokenTexts


class Shape:
    """The answers to one request: whole, or piece by piece."""

    def __init__(self, model: str, texts: TokenTexts, *, chat: bool) -> None:
        self._chat = chat
        self._texts = texts
        self._told: Counter[int] = Counter()  # characters of each choice's tokens so far
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

    def piece(
        self, number: int, text: str, reason: str | None, likely: Sequence[Likelihood], *, first: bool = False
    ) -> dict[str, Any]:
        """A part of one choice's text, with the likelihoods of its tokens if they were asked for."""
        choice: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": self._logprobs(number, likely)}
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
        logprobs = self._logprobs(number, one.likelihoods)
        return {"index": number, "finish_reason": one.finish_reason, "logprobs": logprobs} | said

    def _logprobs(self, number: int, likely: Sequence[Likelihood]) -> dict[str, Any] | None:
        if not likely:
            return None
        if self._chat:
            content = [
                self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(*pair) for pair in one.likeliest]}
                for one in likely
            ]
            return {"content": content, "refusal": None}
        texts = [self._texts(one.token)[0] for one in likely]
        offsets = []
        for text in texts:
            offsets.append(self._told[number])
            self._told[number] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in likely],
            "top_logprobs": [
                {self._texts(token)[0]: logprob for token, logprob in (*one.likeliest, (one.token, one.logprob))}
                for one in likely
            ],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, characters = self._texts(token)
        return {"token": text, "logprob": logprob, "bytes": characters}


def usage(choices: Sequence[Continuation], prompt_tokens: int) -> dict[str, int]:
    """How many tokens a request took."""
    new = sum(len(one.tokens) for one in choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}


def problem(error: Refused) -> dict[str, Any]:
    """OpenAI's body of an error."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}
