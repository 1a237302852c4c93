"""``peft.experts=busiest:N``: the experts of each layer that got most tokens in an earlier run."""

import dataclasses
import json
from pathlib import Path

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings import adapted
from mixtral_recipes.settings.peft import LoRA


def with_experts_named[Scheme: LoRA](scheme: Scheme, num_layers: int, num_experts: int) -> Scheme:
    """A scheme whose experts are numbers, which checkpoints record: ``busiest:N`` looked up in ``peft.router_load``.

    Raises:
        RecipeError: no load is given, it cannot be read, or it is of another model.
    """
    wanted = adapted.busiest_of(scheme.experts) if isinstance(scheme.experts, str) else None
    if wanted is None:
        if scheme.router_load is not None:
            raise RecipeError("peft.router_load says which experts are busiest; it needs peft.experts=busiest:N.")
        return scheme
    if scheme.router_load is None:
        raise RecipeError(
            f"peft.experts={scheme.experts} needs the folder of a run that counted its experts' load; set "
            "peft.router_load=FOLDER."
        )
    if wanted > num_experts:
        raise RecipeError(f"peft.experts={scheme.experts}, but the model has {num_experts} experts.")
    load = read_load(Path(scheme.router_load).expanduser())
    if len(load) != num_layers or any(len(layer) != num_experts for layer in load):
        raise RecipeError(
            f"peft.router_load={scheme.router_load} is from a model with {len(load)} layers and {len(load[0])} "
            f"experts, but this one has {num_layers} and {num_experts}."
        )
    by_layer = {
        # Of experts with the same load, the first.
        str(number): sorted(sorted(range(num_experts), key=lambda e, counts=counts: -counts[e])[:wanted])
        for number, counts in enumerate(load)
        if adapted.names(scheme.layers, number, "peft.layers")
    }
    return dataclasses.replace(scheme, experts=by_layer, router_load=None)


def read_load(path: Path) -> list[list[float]]:
    """Tokens of each layer's experts, over all the steps that a run logged.

    Args:
        path: The run's folder, or its ``metrics.jsonl``.

    Raises:
        RecipeError: it cannot be read, or no step in it has the experts' load.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    total: list[list[float]] = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            load = json.loads(line).get("expert_load") if '"expert_load"' in line else None
            if load:
                pairs = zip(total, load, strict=True) if total else ((None, layer) for layer in load)
                total = [
                    [a + float(b) for a, b in zip(sums or [0.0] * len(layer), layer, strict=True)]
                    for sums, layer in pairs
                ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"peft.router_load={path}: cannot be read as a run's metrics.jsonl ({error}); set it to the run's folder."
        ) from error
    if not total or not total[0]:
        raise RecipeError(f"peft.router_load={path}: no step of that run recorded the experts' load.")
    return total
