"""A model that is used: which, on how many processes, and how it answers."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli.options.checkpoint import newest_whole

place = functools.partial(typer.Option, rich_help_panel="Where it runs")
drawing = functools.partial(typer.Option, rich_help_panel="How it answers")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run's name or folder, a checkpoint, an adapter, nemo://ID, a Hugging Face folder or hf://org/name.",
    ),
]


def model_checkpoint(model: str) -> Path:
    """The checkpoint that MODEL means; a Hugging Face model or a peft folder is imported first, once.

    Raises:
        CheckpointError: there is no such model.
        LaunchError: it is neither a folder nor a run.
    """
    from mixtral_recipes.executors.runs.records import run_folder
    from mixtral_recipes.importers.resolve import resolve

    path = Path(model).expanduser()
    if "://" in model or (len(path.parts) > 1 and not path.exists()):
        return resolve(model)
    folder = path if path.is_dir() else run_folder(model)
    return newest_whole(folder) if (folder / "checkpoints").is_dir() else resolve(str(folder))


@dataclass
class LayoutOptions:
    """How a model is laid out over processes."""

    num_gpus_per_node: Annotated[
        int, place("--num-gpus-per-node", metavar="N", min=1, help="Processes, one per GPU.")
    ] = 1
    tensor_model_parallel_size: Annotated[int, place("--tensor-model-parallel-size", metavar="N", min=1)] = 1
    pipeline_model_parallel_size: Annotated[int, place("--pipeline-model-parallel-size", metavar="N", min=1)] = 1
    expert_model_parallel_size: Annotated[
        int | None,
        place("--expert-model-parallel-size", metavar="N", min=1, help="Default: as many as there are processes left."),
    ] = None
    dtype: Annotated[
        str | None, place("--dtype", metavar="TYPE", help="bf16, fp16 or fp32; default: what config.json says.")
    ] = None

    def topology(self) -> Any:
        """The layout, checked.

        Raises:
            RecipeError: the sizes do not fit each other.
        """
        from mixtral_recipes.errors import RecipeError
        from mixtral_recipes.layout.topology import Topology

        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        left, rest = divmod(self.num_gpus_per_node, model)
        if rest:
            raise RecipeError(
                f"--num-gpus-per-node {self.num_gpus_per_node} is not a multiple of TP x PP = {model}; use {model}."
            )
        experts = self.expert_model_parallel_size or left
        if left % experts or 8 % experts:
            raise RecipeError(
                f"--expert-model-parallel-size {experts} must divide the {left} processes that TP and PP leave, and 8 "
                "experts; use 1, 2, 4 or 8."
            )
        return Topology(
            world_size=self.num_gpus_per_node,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            expert_model_parallel_size=experts,
        )


@dataclass
class SamplingOptions:
    """How continuations are made."""

    max_new_tokens: Annotated[int, drawing("--max-new-tokens", metavar="N", help="Most tokens of an answer.")] = 128
    temperature: Annotated[float, drawing("--temperature", metavar="T", help="0 takes the likeliest token.")] = 0.0
    top_k: Annotated[int, drawing("--top-k", metavar="K", help="Draw from the K likeliest; 0 is all.")] = 0
    top_p: Annotated[float, drawing("--top-p", metavar="P", help="Draw from the likeliest that sum to P.")] = 1.0
    repetition_penalty: Annotated[
        float, drawing("--repetition-penalty", metavar="X", help="Above 1: what was said before becomes less likely.")
    ] = 1.0
    stop: Annotated[list[str] | None, drawing("--stop", metavar="TEXT", help="End at this text; repeatable.")] = None
    seed: Annotated[int, drawing("--seed", metavar="N", help="Of the draws.")] = 0

    def sampling(self) -> Any:
        """The same for the generator.

        Raises:
            RecipeError: a value out of range.
        """
        from mixtral_recipes.inference.sampling import Sampling

        return Sampling(
            self.max_new_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.repetition_penalty,
            tuple(self.stop or ()),
            self.seed,
        )


Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="One prompt a line, or JSON lines with a prompt; - is stdin."),
]
