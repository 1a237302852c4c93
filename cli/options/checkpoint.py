"""A checkpoint on the command line, and what import and export offer alike."""

from typing import Annotated

from mixtral_recipes.cli.options.groups import argument, option
from mixtral_recipes.cli.options.runs import complete_run

Checkpoint = Annotated[
    str,
    argument(
        "CHECKPOINT",
        "Checkpoint folder or nemo://ID; or a run's name, id or folder: its newest complete checkpoint.",
        autocompletion=complete_run,
    ),
]
Dtype = Annotated[str | None, option("--dtype TYPE", "bf16, fp16 or fp32; default: unchanged.")]
Base = Annotated[str | None, option("--base MODEL", "The adapters' base model, if it has moved.")]
Overwrite = Annotated[
    bool, option("--overwrite", "Replace what is there, if it is of the same kind and holds nothing else.")
]
PushToHub = Annotated[
    str | None, option("--push-to-hub ORG/NAME", "Upload the finished folder to this Hub repository.")
]
Public = Annotated[bool, option("--public", "If the repository is created, make it public.")]


def refuse_public(public: bool, push_to_hub: str | None) -> None:
    """Refuse ``--public`` where nothing is uploaded.

    Raises:
        RecipeError: it would have no effect.
    """
    if public and not push_to_hub:
        from mixtral_recipes.errors import RecipeError

        raise RecipeError("--public has no effect without --push-to-hub; leave it out.")
