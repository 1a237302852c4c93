"""What a client may ask, in OpenAI's words: each field is read, known to do nothing, or refused by name."""

import codecs
import itertools
import logging
import math
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixtral_recipes.data.records.conversations import joined_texts
from mixtral_recipes.errors import MixtralRecipesError
from mixtral_recipes.inference.sampling import Sampling

# What would need an answer of another kind, with the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "function_call": ("none",), "functions": ([],),
    "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (),
    "response_format": ({"type": "text"},), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],),
    "web_search_options": (),
}  # fmt: skip
_NOTHING_TO_DO = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}


class Refused(MixtralRecipesError):
    """A request that is not answered.

    Attributes:
        status: HTTP's number.
        kind: OpenAI's ``type``.
        code: OpenAI's ``code``, or None.
        param: The field it is about, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param


def refusal(error: Exception) -> Refused:
    """What a client is told of an error; of an unforeseen one only its type, while the log gets all of it."""
    if isinstance(error, Refused):
        return error
    told = str(error)
    if not isinstance(error, MixtralRecipesError):
        logging.getLogger(__name__).error("a request could not be answered", exc_info=error)
        told = f"The server could not answer ({type(error).__name__})."
    return Refused(told, status=500, kind="server_error")


class _Options(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


_Stop = Annotated[str, Field(min_length=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)] | None
_Likeliest = Annotated[int, Field(ge=0, le=20)] | None


class Body(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: _Penalty = None
    frequency_penalty: _Penalty = None
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _Options | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    def sampling(self, new_tokens: int, likeliest: int | None = None) -> Sampling:
        """The same settings for the engine; without a seed, a random one.

        Args:
            new_tokens: The most there may be.
            likeliest: How many of the likeliest tokens are told at each place; None tells no likelihoods.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            stop=tuple(stop),
            continues=isinstance(self, Completion),
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            logprobs=likeliest,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return bool(self.stream_options and self.stream_options.include_usage)


_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Completion(Body):
    """The body of ``POST /v1/completions``."""

    prompt: str | _Tokens | Annotated[list[str] | list[_Tokens], Field(min_length=1)]
    logprobs: _Likeliest = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_empty(cls, found: Any) -> Any:
        """An answer that its client sends back has fields that hold nothing: ``refusal``, ``tool_calls``."""
        if not isinstance(found, dict):
            return found
        return {key: value for key, value in found.items() if key in cls.model_fields or value not in (None, [])}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else joined_texts(part.text for part in self.content)


class Chat(Body):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: _Likeliest = None

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(one.role, one.role), "content": one.text} for one in self.messages]


_FIELDS = {name for kind in (Completion, Chat, _Message, _Part, _Options) for name in kind.model_fields}


def parsed[T: Body](kind: type[T], body: bytes) -> T:
    """A request's body.

    Raises:
        Refused: it is no JSON, or a field is missing, unknown or out of its range; names the field.
    """
    try:
        found = kind.model_validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        # of a union pydantic lists every branch: the shortest place says which field, the longest what is wrong there;
        # what may not be there at all comes before what is missing
        found = [(_place(one["loc"], one["type"]), one) for one in error.errors(include_url=False, include_input=False)]
        place, _ = min(found, key=lambda one: (len(one[1]["loc"]), one[1]["type"] == "missing"))
        here = [(where, one) for where, one in found if where == place or where.startswith(f"{place}.")]
        place, worst = max(here, key=lambda one: (len(one[1]["loc"]), not one[1]["type"].endswith("_type")))
        message = worst["msg"].removeprefix("Value error, ")
        raise Refused(f"{place}: {message}." if place else f"{message}.", param=place or None) from None
    for name, value in (found.model_extra or {}).items():
        if value is None or name in _NOTHING_TO_DO:
            continue
        if value not in _NOT_DONE.get(name, ()):
            why = "is not supported by this server" if name in _NOT_DONE else "unknown parameter"
            raise Refused(f"{name[:100]}: {why}; leave it out.", param=name[:100])
    if found.stream_options is not None and not found.stream:
        raise Refused("stream_options: only valid with stream=true; leave it out.", param="stream_options")
    if isinstance(found, Chat) and found.top_logprobs and not found.logprobs:
        raise Refused("top_logprobs: only valid with logprobs=true; leave it out.", param="top_logprobs")
    return found


def _place(loc: tuple[int | str, ...], kind: str) -> str:
    """Where an error is, without pydantic's names of a union's branches; a field that nobody knows by its name."""
    known = itertools.takewhile(lambda part: isinstance(part, int) or part in _FIELDS, loc)
    return ".".join(map(str, [*known, *([str(loc[-1])[:100]] if kind == "extra_forbidden" else [])]))


def new_tokens(asked: int | None, prompt: int, context: int, *, otherwise: int | None = None) -> int:
    """How many tokens a request may get.

    Args:
        asked: What it asks for.
        prompt: How many tokens its prompt has.
        context: How many there may be in all.
        otherwise: Where it asks for nothing; None is all there is room for.

    Raises:
        Refused: there is no room.
    """
    room = context - prompt
    wanted = asked if asked is not None else min(room, otherwise or math.inf)
    if room < 1 or wanted > room:
        extra = f" and {asked} new ones were requested" if asked is not None else ""
        raise Refused(
            f"This model's maximum context length is {context} tokens, but the prompt has {prompt}{extra}; shorten "
            "the prompt or lower max_tokens.",
            code="context_length_exceeded",
            param="messages" if otherwise is None else "prompt",
        )
    return int(wanted)
