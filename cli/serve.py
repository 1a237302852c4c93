"""``mixtral-recipes serve``."""

import os
from pathlib import Path
from typing import Any, NoReturn

from mixtral_recipes.cli.options.model import LayoutOptions, Model
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.options.serving import ServerOptions
from mixtral_recipes.cli.output import note, print_json
from mixtral_recipes.executors.runs.checkpoints import model_checkpoint

_SMALL = 4e9  # bytes of weights that are served here; Megatron's layers are not made for serving more


def command(*, model: Model, server: ServerOptions, layout: LayoutOptions, json: Json = False) -> None:
    """Serve a model behind OpenAI's API.

    Small models are served here, on Megatron; for larger ones, the vLLM command that serves them is printed.
    """
    from mixtral_recipes.errors import RecipeError, nearest
    from mixtral_recipes.inference.serve.access import read_token
    from mixtral_recipes.inference.serve.vllm import TOKEN
    from mixtral_recipes.system.ranks import launched

    engine = server.engine
    if engine not in (None, "megatron", "vllm"):
        raise RecipeError(f"--engine {engine} is not supported.{nearest(engine, ['megatron', 'vllm'])}")
    topology = layout.topology()
    token = read_token(server.token_file, os.environ.get(TOKEN), server.host)
    if not launched() and (server.exec_ or engine == "vllm" or (engine is None and _is_large(model))):
        _by_vllm(model, server, layout, token, json=json)
        return
    if layout.devices > 1 and token is not None:
        os.environ[TOKEN] = token  # for the processes that are started
    if not layout.runs_again(to_ranks=True):
        _here(model, server, topology, layout.dtype, token, json=json)


def _by_vllm(model: str, server: ServerOptions, layout: LayoutOptions, token: str | None, *, json: bool) -> None:
    """Print vLLM's command, or become it."""
    from mixtral_recipes.inference.serve.vllm import VLLM

    called = server.name_of(model)
    settings = VLLM(
        _for_vllm(model),
        called,
        server.host,
        server.port,
        layout.devices,
        server.context_length,
        layout.dtype,
        server.batch_size,
    )
    if server.exec_:
        _become(settings.words(), token)
    print(settings.line(with_token=token is not None))
    if json:
        print_json({"model": called, "command": settings.words()})
    note(f"This serves {called} with vLLM; --exec runs it, --engine megatron serves the model here instead.")


def _here(
    model: str, server: ServerOptions, topology: Any, dtype: str | None, token: str | None, *, json: bool
) -> None:
    """Serve on Megatron, in this process or as one of several."""
    from mixtral_recipes.errors import RecipeError
    from mixtral_recipes.inference.model import InferenceModel, join
    from mixtral_recipes.inference.serve.server import listening, serve
    from mixtral_recipes.system.ranks import first, launched_rank

    topology = join(topology)
    opened: list[Any] = []
    first(lambda: opened.append(listening(server.host, server.port)))  # refused before the model is read
    loaded = InferenceModel.load(model_checkpoint(model), topology, dtype=dtype)
    most, context = loaded.config.max_position_embeddings, server.context_length
    if context and context > most:
        raise RecipeError(f"--context-length {context} is more than the model's max_position_embeddings={most}.")
    called = server.name_of(model)
    counted = serve(
        loaded,
        opened[0] if launched_rank() == 0 else None,
        name=called,
        token=token,
        rows=server.batch_size,
        context=context or most,
        most_waiting=server.queue,
        ready=lambda url: note(f"{url} serves {called}; Ctrl-C or SIGTERM stops it."),
    )
    if json and launched_rank() == 0:
        print_json({"model": called, **counted})


def _become(words: list[str], token: str | None) -> NoReturn:
    """Replace this process by vLLM."""
    from mixtral_recipes.errors import EnvironmentProblem

    environment = os.environ | ({"VLLM_API_KEY": token} if token is not None else {})
    try:
        os.execvpe(words[0], words, environment)
    except OSError as error:
        raise EnvironmentProblem(
            f"{words[0]} cannot be run ({error.strerror}); install it (pip install vllm), or leave out --exec and "
            "run the printed command where vLLM is installed."
        ) from error


def _published(model: str) -> Path | None:
    """The Hugging Face or peft folder that a MODEL is, or that a run was exported to; None if there is none."""
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
    from mixtral_recipes.checkpoints.lineage.links import BASE_ELSEWHERE, base_of
    from mixtral_recipes.system.files import size_of

    if model.startswith("hf://") and not Path(model.removeprefix("hf://")).expanduser().is_dir():
        return True  # to know more, it would have to be fetched
    folder = _published(model)
    if folder is None or (folder / "adapter_config.json").is_file():
        folder = model_checkpoint(model)
        if read_manifest(folder)["kind"] == "adapter":
            folder = base_of(folder, place_option=BASE_ELSEWHERE)
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
            f"vLLM reads Hugging Face folders, but {model} is a checkpoint: run `mixtral-recipes export {model} "
            "FOLDER` (for an adapter alone, with --format peft), then serve FOLDER."
        )
    return str(folder)
