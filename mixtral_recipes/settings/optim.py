"""Optimizer and learning-rate schedule, in NeMo's spelling."""

from dataclasses import dataclass, field

from megatron.core.optimizer.optimizer_config import OptimizerConfig


@dataclass
class CosineAnnealingScheduler:
    """Linear warmup, cosine decay to ``min_lr``, then ``constant_steps`` at ``min_lr``.

    Attributes:
        warmup_steps: Steps of linear warmup from 0.
        constant_steps: Steps at ``min_lr`` at the end.
        min_lr: Where the cosine ends.
        max_steps: Steps of the whole schedule; None takes the trainer's.
    """

    warmup_steps: int = 750
    constant_steps: int = 0
    min_lr: float = 6e-7
    max_steps: int | None = None


@dataclass
class MegatronOptimizerModule:
    """An optimizer to build.

    Attributes:
        config: Megatron's OptimizerConfig.
        lr_scheduler: The schedule; None keeps the learning rate constant.
    """

    config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, use_distributed_optimizer=True))
    lr_scheduler: CosineAnnealingScheduler | None = None
