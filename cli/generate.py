"""``mixtral-recipes generate``."""

from pathlib import Path
from typing import Annotated, Any

from mixtral_recipes.cli.options.groups import argument, option
from mixtral_recipes.cli.options.model import LayoutOptions, Model, Prompts, SamplingOptions
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import note, print_json, say_part
from mixtral_recipes.executors.runs.checkpoints import model_checkpoint


def command(
    *,
    model: Model,
    prompt: Annotated[str | None, argument("[PROMPT]", "The text to continue.")] = None,
    prompts: Prompts = None,
    chat: Annotated[bool, option("--chat", "Each prompt is a question; use the chat template.")] = False,
    batch_size: Annotated[int, option("--batch-size N", "Prompts continued together in a process.", min=1)] = 8,
    layout: LayoutOptions,
    sampling: SamplingOptions,
    json: Json = False,
) -> None:
    """Continue prompts with a model.

    On Megatron, in the given layout; nothing is exported. Text appears as it is generated.
    """
    from mixtral_recipes.errors import RecipeError

    if (prompt is None) == (prompts is None):
        raise RecipeError("pass a PROMPT, or --prompts FILE.")
    how, topology = sampling.sampling(continues=not chat), layout.topology()
    if layout.runs_again():
        return

    import time

    from mixtral_recipes.inference import prompts as given
    from mixtral_recipes.inference.chat import answering
    from mixtral_recipes.inference.generate import generate
    from mixtral_recipes.inference.model import InferenceModel, join
    from mixtral_recipes.system.ranks import first, launched_rank

    topology = join(topology)
    texts = [prompt] if prompt is not None else first(lambda: given.read(prompts or Path("-")))
    loaded = InferenceModel.load(model_checkpoint(model), topology, dtype=layout.dtype)
    how = answering(how, loaded.tokenizer) if chat else how
    tokens = [given.tokens(loaded.tokenizer, text, chat=chat) for text in texts]
    speaks = launched_rank() == 0
    stream = speaks and prompt is not None and not json
    show = (lambda _, text: say_part(text)) if stream else None
    started = time.perf_counter()
    answers = generate(loaded, tokens, how, batch_size=batch_size, on_text=show)
    seconds = time.perf_counter() - started
    if not speaks:
        return
    if stream:
        print(flush=True)
    count = sum(len(answer.tokens) for answer in answers)
    note(f"{count} tokens in {seconds:.1f} s ({count / seconds:.1f} per second)")
    rows: list[dict[str, Any]] = [
        {
            "prompt": text,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": len(answer.tokens),
        }
        for text, answer in zip(texts, answers, strict=True)
    ]
    if json:
        print_json({"model": model, "seconds": round(seconds, 3), "continuations": rows})
    elif not stream:
        for row in rows:
            say_part(f"> {row['prompt']}\n{row['text']}\n\n")
