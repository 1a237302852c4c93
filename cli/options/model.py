"""A model that is used: which, on how many processes, and how it answers."""

import functools
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mixtral_recipes.cli.options.checkpoint import Dtype
from mixtral_recipes.cli.options.groups import argument, field, option

place = functools.partial(field, rich_help_panel="Where it runs")
drawing = functools.partial(field, rich_help_panel="How it answers")

Model = Annotated[
    str,
    argument(
        "MODEL", "A run's name or folder, a checkpoint, an adapter, nemo://ID, a Hugging Face folder or hf://org/name."
    ),
]
Prompts = Annotated[
    Path | None, option("--prompts FILE", "One prompt per line, or JSON lines with a prompt; - is stdin.")
]


@dataclass
class LayoutOptions:
    """How a model is laid out over processes."""

    devices: int = place("--devices N", "Processes on this machine, one per GPU.", 1, min=1, max=1024)
    tp: int = place("--tp N", "Tensor-parallel size.", 1, min=1)
    pp: int = place("--pp N", "Pipeline-parallel size.", 1, min=1)
    ep: int | None = place("--ep N", "Expert-parallel size; default: the processes TP and PP leave.", min=1)
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

    def runs_again(self, *, to_ranks: bool = False) -> bool:
        """Run this process's command line in as many processes as are asked for; False where it is one of them.

        Args:
            to_ranks: As for `executors.again.again`.
        """
        from mixtral_recipes.system.ranks import launched

        if self.devices == 1 or launched():
            return False
        from mixtral_recipes.executors.again import again

        again(sys.argv[1:], self.devices, to_ranks=to_ranks)
        return True


@dataclass
class SamplingOptions:
    """How continuations are made."""

    max_new_tokens: int = drawing("--max-new-tokens N", "Maximum tokens of an answer.", 128)
    temperature: float = drawing("--temperature T", "0 takes the most likely token.", 0.0)
    top_k: int = drawing("--top-k K", "Sample from the K most likely tokens; 0: from all.", 0)
    top_p: float = drawing("--top-p P", "Sample from the most likely tokens that sum to P.", 1.0)
    repetition_penalty: float = drawing(
        "--repetition-penalty X", "Above 1: tokens used before become less likely.", 1.0
    )
    stop: list[str] | None = drawing("--stop TEXT", "End at this text; may be repeated.")
    seed: int = drawing("--seed N", "Random seed of the sampling.", 0)

    def sampling(self, *, continues: bool = False) -> Any:
        """The same for the generator.

        Args:
            continues: As for `Sampling`.

        Raises:
            RecipeError: a value out of range.
        """
        from mixtral_recipes.errors import MixtralRecipesWarning
        from mixtral_recipes.inference.sampling import Sampling
        from mixtral_recipes.system.ranks import launched

        given: dict[str, Any] = {**vars(self), "stop": tuple(self.stop or ())}
        made = Sampling(**given, continues=continues)
        of_draws = [name for name in ("top_k", "top_p", "seed") if given[name] != getattr(Sampling, name)]
        if of_draws and made.temperature == 0 and not launched():
            options = ", ".join(f"--{name.replace('_', '-')} {given[name]}" for name in of_draws)
            warnings.warn(
                f"{options}: no effect without --temperature, since at 0 nothing is sampled.",
                MixtralRecipesWarning,
                stacklevel=2,
            )
        return made
