"""A NeMo AutoModel YAML file as a recipe. Reading it runs nothing: classes it names are compared, never imported."""

from pathlib import Path
from typing import Any

import nemo_run as run

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import loading
from mixtral_recipes.overrides.automodel.data import data_of
from mixtral_recipes.overrides.automodel.layout import make_it_fit, processes_of, set_layout
from mixtral_recipes.overrides.automodel.training import set_adapters, set_optimizer, set_run
from mixtral_recipes.overrides.automodel.values import Values
from mixtral_recipes.recipes import catalog
from mixtral_recipes.system.json_files import read_object


def is_automodel(data: dict[str, Any]) -> bool:
    """Whether a YAML file's content is one of AutoModel's: it has their schedule of steps and a model by target."""
    model = data.get("model")
    return isinstance(model, dict) and ("step_scheduler" in data or isinstance(data.get("recipe"), dict))


class AutoModelFile:
    """What a file of AutoModel's says.

    Attributes:
        name: The recipe it is one of.
        values: Its keys.
        notes: One line for each reason why keys are not needed, and for each choice the file leaves open.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        """Look every key up.

        Raises:
            RecipeError: names every unknown key, and every value that is refused.
        """
        self.values = Values(data)
        self.notes = self.values.notes
        self.name, self._path, self._instruct = _model(self.values)

    def recipe(
        self, num_nodes: int | None = None, num_gpus_per_node: int | None = None, hardware: str = "h100"
    ) -> run.Partial[Any]:
        """The recipe.

        Args:
            num_nodes: Nodes; None uses the file's, or the fewest that hold the job.
            num_gpus_per_node: Processes per node; None uses the file's, or the recipe's.
            hardware: The card that must hold it.

        Raises:
            RecipeError: something the file asks for is not supported.
        """
        values = self.values
        name, path, instruct = self.name, self._path, self._instruct
        nodes, gpus = processes_of(values, num_nodes, num_gpus_per_node)
        arguments = {"num_nodes": nodes, "num_gpus_per_node": gpus, "hardware": hardware, "instruct": instruct}
        packed = values.whole("packed_sequence.packed_sequence_size", 0, least=0)
        recipe = loading.load(
            name,
            "finetune",
            peft_scheme=_scheme(values),
            packed_sequence=packed > 0,
            **{argument: value for argument, value in arguments.items() if value},
            **({"precision": "fp8"} if values.take("fp8.enabled") else {}),
        )
        recipe.resume.restore_config.path = path
        recipe.data = data_of(values, recipe.data, packed)
        set_run(values, recipe)
        set_optimizer(values, recipe)
        set_adapters(values, recipe)
        set_layout(values, recipe, packed > 0)
        if catalog.entry(name).needs_gpu:
            make_it_fit(values, recipe, hardware, nodes)
        return recipe


def _model(values: Values) -> tuple[str, str, bool]:
    target = str(values.take("model._target_", ""))
    if not target.endswith(".from_pretrained"):
        raise RecipeError(
            f"model._target_={target} is not supported, only from_pretrained; use pretrain for new weights."
        )
    named = str(values.take("model.pretrained_model_name_or_path", ""))
    revision = values.take("model.revision")
    for name, entry in catalog.CATALOG.items():
        for checkpoint, instruct in ((entry.base, False), (entry.instruct, True)):
            if checkpoint == named:
                hub = "" if "://" in named else "hf://"
                return name, f"{hub}{named}" + (f"@{revision}" if revision else ""), instruct
    folder = Path(named).expanduser()
    if not (folder / "config.json").is_file():
        known = dict.fromkeys(entry.base for entry in catalog.CATALOG.values() if entry.base)
        raise RecipeError(
            f"model.pretrained_model_name_or_path={named} is not a Mixtral with a recipe ({', '.join(known)}, "
            "their Instruct variants, or a folder with a config.json)."
        )
    return _recipe_of_folder(folder), str(folder), False


def _scheme(values: Values) -> str:
    if values.take("peft._target_") is None:
        return "none"
    return "dora" if values.take("peft.use_dora") else "lora"


def _recipe_of_folder(folder: Path) -> str:
    """The recipe of a local checkpoint, by its sizes."""
    config = read_object(folder / "config.json", RecipeError)
    sizes = (config.get("num_hidden_layers"), config.get("hidden_size"))
    for name, entry in catalog.CATALOG.items():
        if (entry.shape.num_layers, entry.shape.hidden_size) == sizes:
            return name
    raise RecipeError(
        f"model.pretrained_model_name_or_path={folder} has {sizes[0]} layers of width {sizes[1]}, which match no "
        "recipe."
    )
