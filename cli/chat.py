"""``mixtral-recipes chat``."""

import sys
from typing import TYPE_CHECKING, Annotated

from mixtral_recipes.cli.options.groups import option
from mixtral_recipes.cli.options.model import LayoutOptions, Model, SamplingOptions
from mixtral_recipes.cli.output import note, say, say_part
from mixtral_recipes.executors.runs.checkpoints import model_checkpoint

if TYPE_CHECKING:
    from mixtral_recipes.inference.chat import Conversation
    from mixtral_recipes.inference.model import InferenceModel
    from mixtral_recipes.inference.sampling import Sampling

HELP = (
    "/system TEXT sets the system message, /reset clears the conversation, /quit (or Ctrl-D) ends the chat; "
    "Ctrl-C stops an answer."
)


def command(
    *,
    model: Model,
    system: Annotated[str, option("--system TEXT", "System message: what the model is told first.")] = "",
    compare: Annotated[bool, option("--compare", "For an adapter: show what its base model answers, too.")] = False,
    layout: LayoutOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk to a model on the terminal.

    Its tokenizer's chat template is used. Lines beginning with / are commands; /help lists them.
    """
    from mixtral_recipes.errors import RecipeError

    how, topology = sampling.sampling(), layout.topology()
    if layout.runs_again():
        return

    from mixtral_recipes.inference.chat import Conversation, answering
    from mixtral_recipes.inference.model import InferenceModel, join
    from mixtral_recipes.system.ranks import first, launched_rank

    topology = join(topology)
    loaded = InferenceModel.load(model_checkpoint(model), topology, dtype=layout.dtype)
    if compare and not loaded.adapted:
        raise RecipeError(f"--compare shows an adapter beside its base, but {model} is not an adapter; leave it out.")
    how = answering(how, loaded.tokenizer)
    speaks = launched_rank() == 0
    talk, base_talk = Conversation(loaded.tokenizer, system), Conversation(loaded.tokenizer, system)
    if speaks:
        note(f"{model}. {HELP}")
    while (line := first(_ask)) is not None:
        words = line.strip()
        if words.startswith("/"):
            name, _, rest = words.partition(" ")
            if name == "/quit":
                break
            if name == "/reset":
                talk.reset()
                base_talk.reset()
            elif name == "/system":
                talk.system = base_talk.system = rest
            elif speaks:
                note(HELP)
        elif words:
            _turn(loaded, talk, words, how, "" if not compare else "adapter: ", speaks=speaks)
            if compare:
                with loaded.without_adapters():
                    _turn(loaded, base_talk, words, how, "base:    ", speaks=speaks)


def _ask() -> str | None:
    """The next line; None at the end."""
    from mixtral_recipes.errors import DataError

    try:
        line = input("> " if sys.stdin.isatty() else "")
        line.encode()  # in some locales Python reads bytes that are no text as halves of characters
        return line
    except EOFError:
        return None
    except UnicodeError as error:
        raise DataError(f"standard input is not UTF-8 ({error}).") from error


def _turn(
    loaded: "InferenceModel", talk: "Conversation", question: str, how: "Sampling", label: str, *, speaks: bool
) -> None:
    """Ask, show the answer as it comes, and keep it."""
    from mixtral_recipes.errors import MixtralRecipesError
    from mixtral_recipes.inference.generate import generate
    from mixtral_recipes.system.ranks import rank_and_size

    def show(number: int, text: str) -> None:
        say_part(text)

    if speaks:
        print(label, end="", flush=True)
    try:
        (answer,) = generate(loaded, [talk.asked(question)], how, on_text=show if speaks else None)
    except MixtralRecipesError as error:
        if speaks:
            say(f"({error})")
        return
    except KeyboardInterrupt:
        if rank_and_size()[1] > 1:
            raise  # the others may be a step further
        say("\n(stopped; the question is discarded)")
        return
    talk.answered(question, answer.text)
    if speaks:
        print(flush=True)
