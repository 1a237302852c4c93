"""The loss on a data set, by the function that validates while training."""

import math

from megatron.core.pipeline_parallel import get_forward_backward_func

from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.inference.model import InferenceModel, no_numbers
from mixtral_recipes.layout.shapes import BatchShape
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training.run import TrainingRun
from mixtral_recipes.training.step import Losses, validate


def loss_on(model: InferenceModel, data: DataModule, limit_batches: int | None) -> Losses:
    """The mean loss per label token of a data set's validation split; all ranks call it together.

    Args:
        model: The model.
        data: The data set, set up; its batch is fitted to the layout.
        limit_batches: Most global batches; None takes all.

    Raises:
        CheckpointError: the model makes no numbers of it.
        DataError: there is no validation split.
        RecipeError: the data-parallel ranks cannot share its global batch.
    """
    ranks = model.topology.data_parallel_size
    if data.global_batch_size % ranks:
        raise RecipeError(
            f"data.global_batch_size={data.global_batch_size} cannot be split evenly over {ranks} data-parallel "
            "processes; choose another --devices."
        )
    data.micro_batch_size = math.gcd(data.micro_batch_size, data.global_batch_size // ranks)
    run = TrainingRun(
        trainer=Trainer(limit_val_batches=limit_batches),
        topology=model.topology,
        config=model.config,
        model=[model.chunk],
        ddp=[model.chunk],
        optimizer=None,
        scheduler=None,
        data=data,
        device=model.device,
        forward_backward=get_forward_backward_func(),
        batch=BatchShape.of(data),
    )
    try:
        found = validate(run)
    finally:
        model.chunk.eval()
    if found is None:
        raise DataError(
            f"{data.form}: no validation split, and too few samples to hold any out, so there is nothing to measure; "
            "pass a folder with a train and a validation file."
        )
    if not math.isfinite(found.loss):
        raise no_numbers("losses")
    return found
