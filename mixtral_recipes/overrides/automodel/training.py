"""How an AutoModel file trains: its run, its optimizer, its adapters."""

import fnmatch
from typing import Any

import nemo_run as run

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.overrides.automodel.values import Values, short_name
from mixtral_recipes.settings.classes import class_named

_LOGGERS = {"wandb": ("project", "name", "entity"), "mlflow": ("experiment_name", "run_name", "tracking_uri")}
# Hugging Face's name of a linear layer -> Megatron's. Megatron fuses q, k and v, and w1 and w3.
_LINEARS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "linear_qkv"),
    "o_proj": "linear_proj",
    **dict.fromkeys(("w1", "w3", "gate_proj", "up_proj", "gate_up_proj", "gate_and_up_projs"), "linear_fc1"),
    **dict.fromkeys(("w2", "down_proj", "down_projs"), "linear_fc2"),
}


def set_run(values: Values, recipe: Any) -> None:
    """How long, how often, where to."""
    if values.take("step_scheduler.max_steps") is None:
        raise RecipeError(
            "step_scheduler.max_steps is not set; the number of epochs does not determine the number of steps."
        )
    settings = {
        "trainer.max_steps": values.take("step_scheduler.max_steps"),
        "data.global_batch_size": values.take("step_scheduler.global_batch_size"),
        "data.num_workers": values.take("dataloader.num_workers"),
        "log.ckpt.every_n_train_steps": values.take("step_scheduler.ckpt_every_steps"),
        "log.ckpt.save_top_k": values.take("checkpoint.max_recent_checkpoints"),
        "log.log_dir": values.take("checkpoint.checkpoint_dir"),
        "trainer.val_check_interval": values.take("step_scheduler.val_every_steps"),
        "trainer.log_every_n_steps": values.take("step_scheduler.log_remote_every_steps"),
        "trainer.strategy.ckpt_async_save": values.take("checkpoint.is_async"),
        "resume.resume_from_path": values.take("checkpoint.restore_from"),
        "model.config.moe_aux_loss_coeff": values.take("model.router_aux_loss_coef"),
    }
    seed = values.take("rng.seed", values.take("seed"))
    settings |= {"trainer.seed": seed, "data.seed": seed}
    for logger in _LOGGERS:
        given = {f"log.{logger}.{name}": values.take(f"{logger}.{name}") for name in _LOGGERS[logger]}
        settings |= given if values.take(f"{logger}.enable", True) else {}
    for path, value in settings.items():
        if value is not None:
            overrides.set_value(recipe, path, value)
    if "validation_dataset" in values.given and values.take("validation_dataset") is None:
        recipe.trainer.val_check_interval = 0
    if not values.take("checkpoint.enabled", True):
        recipe.log.ckpt.every_n_train_steps, recipe.log.ckpt.save_last, recipe.log.ckpt.save_top_k = None, False, 0
    if values.take("step_scheduler.gc_every_steps") is not None:
        interval = values.whole("step_scheduler.gc_every_steps", 0, least=0)
        callback = run.Config(class_named("GarbageCollectionCallback"), gc_interval_train=interval)
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), callback]
    precision = short_name(values.take("model.torch_dtype", "bf16"))
    if precision in ("float32", "fp32"):
        recipe.trainer.plugins.precision, recipe.trainer.strategy.pipeline_dtype = "32", None
    elif precision not in ("bf16", "bfloat16", "auto"):
        raise RecipeError(f"model.torch_dtype={precision} is not supported; use bf16 or float32.")


def set_optimizer(values: Values, recipe: Any) -> None:
    """Optimizer, gradient clipping and learning rates; defaults are torch's and AutoModel's."""
    target = short_name(values.take("optimizer._target_", "Adam"))
    loss = str(short_name(values.take("loss_fn._target_", "MaskedCrossEntropy")))
    if target not in ("Adam", "AdamW", "FusedAdam"):
        raise RecipeError(f"optimizer._target_={target} is not supported; use torch.optim.Adam or torch.optim.AdamW.")
    if not loss.endswith("CrossEntropy"):
        raise RecipeError(f"loss_fn._target_={loss} is not supported: the loss is always cross-entropy; leave it out.")
    betas = values.take("optimizer.betas", [0.9, 0.999])
    if not isinstance(betas, list) or len(betas) != 2:
        raise RecipeError(f"optimizer.betas={betas!r} is not allowed; use two numbers, such as [0.9, 0.999].")
    beta1, beta2 = betas
    lr = values.number("optimizer.lr", 1e-3)  # torch's default, as the next ones
    steps = values.whole("step_scheduler.max_steps", 0)
    config = {
        "lr": lr,
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_eps": values.take("optimizer.eps", 1e-8),
        "weight_decay": values.take("optimizer.weight_decay", 0.01 if target == "AdamW" else 0.0),
        "clip_grad": values.take("clip_grad_norm.max_norm", 1.0),
        "decoupled_weight_decay": target != "Adam",
    }
    for name, value in config.items():
        overrides.set_value(recipe, f"optim.config.{name}", value)
    schedule = any(key.startswith("lr_scheduler.") for key in values.given)
    style = str(values.take("lr_scheduler.lr_decay_style", "cosine" if schedule else "constant"))
    names = {
        "cosine": "CosineAnnealingScheduler",
        "linear": "WarmupAnnealingScheduler",
        "constant": "WarmupPolicyScheduler",
    }
    if style not in names:
        raise RecipeError(f"lr_scheduler.lr_decay_style={style!r} is not supported; use {', '.join(names)}.")
    recipe.optim.lr_scheduler = run.Config(
        class_named(names[style]),
        warmup_steps=values.whole("lr_scheduler.lr_warmup_steps", min(1000, steps // 10) if schedule else 0, least=0),
        min_lr=values.number("lr_scheduler.min_lr", 0.01 * lr),
        max_steps=values.take("lr_scheduler.lr_decay_steps"),
    )


def set_adapters(values: Values, recipe: Any) -> None:
    """Rank, scale and layers of adapters, where the file has some."""
    if recipe.peft is None:
        return
    settings = {
        "dim": values.take("peft.dim", 8),
        "alpha": values.take("peft.alpha", 32),
        "dropout": values.take("peft.dropout", 0.0),
        "dropout_position": values.take("peft.dropout_position", "post"),
        "lora_A_init_method": values.take("peft.lora_A_init", "xavier"),
        "lora_dtype": values.take("peft.lora_dtype"),
        "target_modules": _linears(values, "target_modules"),
        "exclude_modules": _linears(values, "exclude_modules"),
    }
    if values.take("peft.match_all_linear"):
        settings["target_modules"] = sorted(set(_LINEARS.values()))
    if not settings["target_modules"]:
        raise RecipeError("peft does not name any layers; set target_modules or match_all_linear.")
    for name, value in settings.items():
        overrides.set_value(recipe, f"peft.{name}", value)


def _linears(values: Values, key: str) -> list[str]:
    """Megatron's layers among patterns of Hugging Face's names; embeddings, router and head have no adapters."""
    patterns = values.take(f"peft.{key}", [])
    if not isinstance(patterns, list | str):
        raise RecipeError(f"peft.{key}={patterns!r} is not allowed; use a list of layer names.")
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        ending = str(pattern).rpartition(".")[2]
        matched = [layer for name, layer in _LINEARS.items() if fnmatch.fnmatch(name, ending)]
        if not matched and key == "target_modules":
            raise RecipeError(f"peft.{key}={pattern} is not a linear layer of a Mixtral ({', '.join(_LINEARS)}).")
        found += matched
    return list(dict.fromkeys(found))
