"""A ``Modelfile``: what Ollama needs beside a GGUF file, the chat template in its own language (Go's) and stop words.

The template is not translated but taken from what it writes: a few conversations are rendered, and what stands before
and after each turn is read off. What was read off must then write the same conversations, or nothing is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Message = dict[str, str]

_FIRST, _ANSWER, _SECOND, _SYSTEM = "firstquestion", "firstanswer", "secondquestion", "systemprompt"
_CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": _FIRST}],
    [
        {"role": "user", "content": _FIRST},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _SECOND},
    ],
]


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around what is said.

    Attributes:
        user: Before and after a question.
        assistant: Before and after an answer.
        opening: What the model goes on from, behind the last question.
        system: Before and after a system prompt; inside a question, only what comes after it counts.
        place: Where a system prompt stands: a turn of its own, at the start of the first or of the last question.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    system: tuple[str, str]
    place: Literal["turn", "first", "last"]

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation, as the template in Go writes it."""
        system = next((message["content"] for message in messages if message["role"] == "system"), "")
        questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
        holds = {"turn": -1, "first": questions[0], "last": questions[-1]}[self.place] if system else -1
        text = ""
        for number, message in enumerate(messages):
            before, after = {"user": self.user, "assistant": self.assistant, "system": self.system}[message["role"]]
            if message["role"] != "system":
                text += before + (system + self.system[1] if number == holds else "") + message["content"] + after
            elif self.place == "turn":
                text += before + message["content"] + after
        return text + self.opening

    def in_go(self) -> str:
        """As Go's text/template, with Ollama's names."""
        user, assistant = tuple(map(_literal, self.user)), tuple(map(_literal, self.assistant))
        system = tuple(map(_literal, self.system))
        inside = "{{ $.System }}" + system[1]
        question = {
            "turn": "",
            "first": "{{ if and $first $.System }}" + inside + "{{ end }}{{ $first = false }}",
            "last": "{{ if and (eq (len (slice $.Messages $number)) 1) $.System }}" + inside + "{{ end }}",
        }[self.place]
        turn = '{{ else if eq .Role "system" }}' + system[0] + "{{ .Content }}" + system[1]
        return (
            "{{ $first := true }}" * (self.place == "first")
            + "{{ range $number, $_ := .Messages }}"
            + '{{ if eq .Role "user" }}'
            + user[0]
            + question
            + "{{ .Content }}"
            + user[1]
            + '{{ else if eq .Role "assistant" }}'
            + assistant[0]
            + "{{ .Content }}"
            + assistant[1]
            + turn * (self.place == "turn")
            + "{{ end }}{{ end }}"
            + _literal(self.opening)
        )

    @property
    def stops(self) -> list[str]:
        """Texts that an answer ends before: what closes it, and what opens a question."""
        return [text.strip() for text in (self.assistant[1], self.user[0]) if text.strip()]


def turns_of(tokenizer: Any) -> Turns | None:
    """What a tokenizer's chat template puts around turns; None where it has none, or one of another make."""
    if not tokenizer.chat_template:
        return None

    def render(messages: list[Message]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(tokenizer.bos_token or "")  # llama.cpp puts it there itself

    try:
        once, twice = (render(messages) for messages in _CONVERSATIONS)
    except Exception:  # a template is a program of the model's author, and raises what it likes
        return None
    before, found, opening = once.partition(_FIRST)
    middle = twice.partition(_FIRST)[2]
    behind_question, found_answer, rest = middle.partition(_ANSWER)
    behind_answer, found_second, end = rest.partition(_SECOND)
    if not (found and found_answer and found_second and end == opening and behind_answer.endswith(before)):
        return None
    behind_answer = behind_answer.removesuffix(before)
    # What the model goes on from may or may not be how a past answer begins; what is common to both ends the question.
    common = 0
    while common < min(len(opening), len(behind_question)) and opening[common] == behind_question[common]:
        common += 1
    turns = Turns(
        (before, opening[:common]), (behind_question[common:], behind_answer), opening[common:], ("", "\n\n"), "first"
    )
    turns = _with_system(turns, render)
    return turns if all(turns.render(m) == render(m) for m in _CONVERSATIONS) else None


def _with_system(turns: Turns, render: Any) -> Turns:
    """With the place of a system prompt; a template that has none gets it before the first question, as ``chat``."""
    said: Message = {"role": "system", "content": _SYSTEM}
    user, assistant, opening = turns.user, turns.assistant, turns.opening
    try:
        text = render([said, *_CONVERSATIONS[0]])
        before, _, rest = text.partition(_SYSTEM)
        between = rest.partition(_FIRST)[0]
        tries: list[Turns] = [
            Turns(user, assistant, opening, ("", between), place) for place in ("first", "last") if before == user[0]
        ]
        if between.endswith(user[0]):
            tries.append(Turns(user, assistant, opening, (before, between.removesuffix(user[0])), "turn"))
        conversations = [[said, *messages] for messages in _CONVERSATIONS]
        rendered = [render(messages) for messages in conversations]
    except Exception:
        return turns
    for found in tries:
        if [found.render(messages) for messages in conversations] == rendered:
            return found
    return turns


def modelfile(gguf: Path, tokenizer: Any) -> tuple[str, str | None]:
    """The Modelfile of a GGUF file.

    Args:
        gguf: The file, which stands beside it.
        tokenizer: The model's transformers tokenizer.

    Returns:
        Its text; and what a user should know of it.
    """
    lines = [f"FROM ./{gguf.name}", ""]
    turns, note = turns_of(tokenizer), None
    if turns is not None:
        lines += [f'TEMPLATE """{turns.in_go()}"""', ""]
    elif not tokenizer.chat_template:
        lines += ['TEMPLATE """{{ .Prompt }}"""', ""]
        note = "the tokenizer has no chat template: the model simply continues its input"
    else:
        lines += ["# The chat template in the GGUF file cannot be translated into Ollama's template language.", ""]
        note = "the chat template cannot be translated into Ollama's template language; Ollama looks for one of its own"
    stops = [tokenizer.eos_token, *(turns.stops if turns else [])]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys(filter(None, stops))]
    return "\n".join(lines) + "\n", note


def _literal(text: str) -> str:
    """Text that Go's templates write as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
