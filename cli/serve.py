"""``mixtral-recipes serve``."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli.options.checkpoint import model_checkpoint
from mixtral_recipes.cli.options.model import LayoutOptions, Model
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import note, print_json

_SMALL = 4e9  # bytes of weights that are served here; Megatron's layers are not made for serving more


def command(
    *,
    model: Model,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="What clients must send; or MIXTRAL_RECIPES_TOKEN. Needed where --host is not this machine's own.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", metavar="NAME", help="What clients call it; default: MODEL's last part."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts continued together on a process.")
    ] = 8,
    context_length: Annotated[
        int | None,
        typer.Option("--context-length", metavar="N", min=2, help="Most tokens of prompt and answer; default: all."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", metavar="N", min=0, help="Prompts that may wait; more are refused (429).")
    ] = 128,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="megatron (here) or vllm (its command); default: by size."),
    ] = None,
    exec_: Annotated[bool, typer.Option("--exec", help="Run vLLM's command instead of printing it.")] = False,
    layout: LayoutOptions,
    json: Json = False,
) -> None:
    """Serve a model behind OpenAI's interface.

    Small models are served here, on Megatron; for others the command is printed with which vLLM serves them.
    """
    from mixtral_recipes.errors import RecipeError, nearest
    from mixtral_recipes.inference.serve.vllm import TOKEN, VLLM
    from mixtral_recipes.system.ranks import launched

    if engine not in (None, "megatron", "vllm"):
        raise RecipeError(f"--engine {engine} is not known.{nearest(engine, ['megatron', 'vllm'])}")
    topology = layout.topology()
    called = served_model_name or Path(model.rstrip("/")).name
    token = _token(token_file, host)
    if not launched() and (exec_ or engine == "vllm" or (engine is None and _is_large(model))):
        settings = VLLM(
            _for_vllm(model), called, host, port, layout.devices, context_length, layout.dtype, batch_size
        )  # fmt: skip
        if exec_:
            return _become(settings.words(), token)
        print(settings.line(with_token=token is not None))
        if json:
            print_json({"model": called, "command": settings.words()})
        return note(f"vLLM serves {called} with this; --exec runs it, --engine megatron serves the model here.")
    if topology.world_size > 1 and not launched():
        from mixtral_recipes.executors.again import again

        if token is not None:
            os.environ[TOKEN] = token
        return again(sys.argv[1:], topology.world_size, to_ranks=True)

    from mixtral_recipes.inference.model import InferenceModel, join
    from mixtral_recipes.inference.serve.server import listening, serve
    from mixtral_recipes.system.ranks import first, launched_rank

    topology = join(topology)
    opened: list[Any] = []
    first(lambda: opened.append(listening(host, port)))  # refused before the model is read
    loaded = InferenceModel.load(model_checkpoint(model), topology, dtype=layout.dtype)
    most = loaded.config.max_position_embeddings
    if context_length and context_length > most:
        raise RecipeError(f"--context-length {context_length}: the model has max_position_embeddings={most}.")
    counted = serve(
        loaded,
        opened[0] if launched_rank() == 0 else None,
        name=called,
        token=token,
        rows=batch_size,
        context=context_length or most,
        most_waiting=queue,
        ready=lambda url: note(f"{url} serves {called}; Ctrl-C or SIGTERM ends it."),
    )
    if json and launched_rank() == 0:
        print_json({"model": called, **counted})
    return None


def _token(file: Path | None, host: str) -> str | None:
    from mixtral_recipes.inference.serve.access import read_token
    from mixtral_recipes.inference.serve.vllm import TOKEN

    return read_token(file, os.environ.get(TOKEN), host)


def _become(words: list[str], token: str | None) -> None:
    """Let vLLM take this process's place."""
    from mixtral_recipes.errors import EnvironmentProblem

    environment = os.environ | ({"VLLM_API_KEY": token} if token is not None else {})
    try:
        os.execvpe(words[0], words, environment)
    except OSError as error:
        raise EnvironmentProblem(
            f"{words[0]} cannot be run ({error.strerror}); install it (pip install vllm), or run what this command "
            "prints without --exec where it is installed."
        ) from error


def _published(model: str) -> Path | None:
    """The Hugging Face or peft folder that a MODEL is, or that a run was exported to; None where there is none."""
    from mixtral_recipes import embedded
    from mixtral_recipes.executors.runs.records import run_folder

    if model.startswith(embedded.PREFIX):
        return embedded.resolve(model)
    if "://" in model:
        return None
    folder = run_folder(model)
    for place in (folder, folder / "exported"):
        if any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
            return place
    return None


def _is_large(model: str) -> bool:
    """Whether a model is too large to be served here without being asked to."""
    from mixtral_recipes.checkpoints.format.manifest import read_manifest
    from mixtral_recipes.checkpoints.lineage.links import base_of
    from mixtral_recipes.system.files import size_of

    if model.startswith("hf://") and not Path(model.removeprefix("hf://")).expanduser().is_dir():
        return True  # to know more, it would have to be fetched
    folder = _published(model)
    if folder is None or (folder / "adapter_config.json").is_file():
        folder = model_checkpoint(model)
        folder = base_of(folder) if read_manifest(folder)["kind"] == "adapter" else folder
    return size_of(folder) > _SMALL


def _for_vllm(model: str) -> str:
    """What vLLM is given to read.

    Raises:
        RecipeError: it is in a form that vLLM does not read.
    """
    from mixtral_recipes.errors import RecipeError

    if model.startswith("hf://"):
        return model.removeprefix("hf://")
    folder = _published(model)
    if folder is None:
        raise RecipeError(
            f"vLLM reads Hugging Face's form, and {model} is a checkpoint: `mixtral-recipes export {model} FOLDER` "
            "(an adapter alone with --format peft), then serve FOLDER."
        )
    return str(folder)
