"""Adam, with NeMo 2.0's values."""

import nemo_run as run
from megatron.core.optimizer import OptimizerConfig

from mixtral_recipes.settings.objects import returns_config
from mixtral_recipes.settings.optim import CosineAnnealingScheduler, MegatronOptimizerModule


@run.cli.factory
@returns_config
def distributed_fused_adam_with_cosine_annealing(
    precision: str = "bf16-mixed",
    warmup_steps: int = 2000,
    constant_steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.95,
    max_lr: float = 1e-4,
    min_lr: float | None = None,
    clip_grad: float = 1.0,
) -> run.Config[MegatronOptimizerModule]:
    """Distributed Adam with warmup and cosine decay.

    Args:
        precision: No effect: `trainer.plugins` sets the precision.
        warmup_steps: Steps of linear warmup.
        constant_steps: Steps at ``min_lr`` at the end.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        max_lr: Peak learning rate.
        min_lr: Where the cosine ends; None means a tenth of the peak.
        clip_grad: Largest gradient norm.
    """
    return run.Config(
        MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=max_lr,
            weight_decay=0.1,
            adam_beta1=adam_beta1,
            adam_beta2=adam_beta2,
            adam_eps=1e-5,
            use_distributed_optimizer=True,
            clip_grad=clip_grad,
        ),
        lr_scheduler=run.Config(
            CosineAnnealingScheduler,
            warmup_steps=warmup_steps,
            constant_steps=constant_steps,
            min_lr=0.1 * max_lr if min_lr is None else min_lr,
        ),
    )
