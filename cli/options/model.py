"""A model that is used: which, on how many processes, and how it answers."""

import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli.options.checkpoint import Dtype

place = functools.partial(typer.Option, rich_help_panel="Where it runs")
drawing = functools.partial(typer.Option, rich_help_panel="How it answers")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run's name or folder, a checkpoint, an adapter, nemo://ID, a Hugging Face folder or hf://org/name.",
    ),
]


@dataclass
class LayoutOptions:
    """How a model is laid out over processes."""

    devices: Annotated[int, place("--devices", metavar="N", min=1, help="Processes on this machine, one per GPU.")] = 1
    tp: Annotated[int, place("--tp", metavar="N", min=1, help="Tensor-parallel size.")] = 1
    pp: Annotated[int, place("--pp", metavar="N", min=1, help="Pipeline-parallel size.")] = 1
    ep: Annotated[
        int | None,
        place("--ep", metavar="N", min=1, help="Expert-parallel size; default: the processes TP and PP leave."),
    ] = None
    dtype: Dtype = None

    def topology(self) -> Any:
        """The layout, checked.

        Raises:
            RecipeError: the sizes do not fit each other.
        """
        from mixtral_recipes.errors import RecipeError
        from mixtral_recipes.layout.topology import EXPERTS, Topology

        left, rest = divmod(self.devices, self.tp * self.pp)
        if rest:
            raise RecipeError(f"--devices {self.devices} is not a multiple of TP x PP = {self.tp * self.pp}.")
        experts = self.ep or math.gcd(left, EXPERTS)
        if left % experts or EXPERTS % experts:
            raise RecipeError(
                f"--ep {experts} must divide the {left} processes that TP and PP leave, and the {EXPERTS} experts."
            )
        return Topology(
            world_size=self.devices,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
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
        from mixtral_recipes.errors import MixtralRecipesWarning
        from mixtral_recipes.inference.sampling import Sampling
        from mixtral_recipes.system.ranks import launched

        given: dict[str, Any] = {**vars(self), "stop": tuple(self.stop or ())}
        made = Sampling(**given)
        of_draws = [name for name in ("top_k", "top_p", "seed") if given[name] != getattr(Sampling, name)]
        if of_draws and made.temperature == 0 and not launched():
            options = ", ".join(f"--{name.replace('_', '-')} {given[name]}" for name in of_draws)
            warnings.warn(
                f"{options}: no effect without --temperature, since at 0 nothing is drawn.",
                MixtralRecipesWarning,
                stacklevel=2,
            )
        return made


Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="One prompt a line, or JSON lines with a prompt; - is stdin."),
]
