"""A NeMo AutoModel YAML file as a recipe. Reading it runs nothing: classes it names are compared, never imported."""

import fnmatch
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nemo_run as run

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.layout.rules import violations
from mixtral_recipes.overrides import loading
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.overrides.automodel.keys import KEYS, Only, Unneeded, row_of
from mixtral_recipes.planner import cards, memory
from mixtral_recipes.planner.workload import Workload
from mixtral_recipes.recipes import catalog
from mixtral_recipes.settings import classes
from mixtral_recipes.system.json_files import read_object

_MOST_NODES = 64
_LOGGERS = {"wandb": ("project", "name", "entity"), "mlflow": ("experiment_name", "run_name", "tracking_uri")}
# Hugging Face's name of a linear layer -> Megatron's. Megatron fuses q, k and v, and w1 and w3.
_LINEARS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "linear_qkv"),
    "o_proj": "linear_proj",
    **dict.fromkeys(("w1", "w3", "gate_proj", "up_proj", "gate_up_proj", "gate_and_up_projs"), "linear_fc1"),
    **dict.fromkeys(("w2", "down_proj", "down_projs"), "linear_fc2"),
}
_SQUAD = ("squad", "rajpurkar/squad")


def is_automodel(data: dict[str, Any]) -> bool:
    """Whether a YAML file's content is one of AutoModel's: it has their schedule of steps and a model by target."""
    model = data.get("model")
    return isinstance(model, dict) and ("step_scheduler" in data or isinstance(data.get("recipe"), dict))


class AutoModelFile:
    """What a file of AutoModel's says.

    Attributes:
        name: The recipe it is one of.
        notes: One line for each key that is not needed, and for each choice the file leaves open.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        """Look every key up.

        Raises:
            RecipeError: names every key that is not known, and every value that is refused.
        """
        self._given = {key: _plain(value) for key, value in _leaves(data)}
        self._taken: set[str] = set()
        self.notes: list[str] = []
        refused: list[str] = []
        unneeded: dict[str, list[str]] = {}
        for key, value in self._given.items():
            row = row_of(key)
            rule = KEYS[row] if row else None
            if row is None or rule is None:
                refused.append(f"{key}: is not known.{nearest(key, list(KEYS))}")
            elif isinstance(rule, Unneeded):
                unneeded.setdefault(rule.why, []).append(row)
            elif isinstance(rule, Only) and _short_name(value) not in rule.values:
                refused.append(f"{key}={value!r}: cannot be had; {rule.instead}.")
        if refused:
            raise RecipeError(" ".join(refused))
        self.notes += [f"Not needed: {', '.join(dict.fromkeys(rows))}: {why}." for why, rows in unneeded.items()]
        self.name, self._path, self._instruct = self._model()

    def recipe(
        self, num_nodes: int | None = None, num_gpus_per_node: int | None = None, hardware: str = "h100"
    ) -> run.Partial[Any]:
        """The recipe.

        Args:
            num_nodes: Nodes; None takes the file's, or the fewest that hold the job.
            num_gpus_per_node: Processes per node; None takes the file's, or the recipe's.
            hardware: The card that must hold it.

        Raises:
            RecipeError: something the file asks for is not to be had.
        """
        name, path, instruct = self.name, self._path, self._instruct
        nodes, gpus = self._processes(num_nodes, num_gpus_per_node)
        arguments = {"num_nodes": nodes, "num_gpus_per_node": gpus, "hardware": hardware, "instruct": instruct}
        packed = self.whole("packed_sequence.packed_sequence_size", 0, least=0)
        recipe = loading.load(
            name,
            "finetune",
            peft_scheme=self._scheme(),
            packed_sequence=packed > 0,
            **{argument: value for argument, value in arguments.items() if value},
            **({"precision": "fp8"} if self.take("fp8.enabled") else {}),
        )
        recipe.resume.restore_config.path = path
        recipe.data = self._data(recipe.data, packed)
        self._run(recipe)
        self._optimizer(recipe)
        self._adapters(recipe)
        self._layout(recipe, packed > 0)
        if catalog.entry(name).needs_gpu:
            self._make_it_fit(recipe, hardware, nodes)
        return recipe

    def take(self, key: str, default: Any = None) -> Any:
        """A key's value; None in the file is the default."""
        self._taken.add(key)
        value = self._given.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int, *, least: int = 1) -> int:
        """A key's value, a whole number.

        Raises:
            RecipeError: it is something else, less than ``least``, or has more digits than anything that is counted.
        """
        found = self.take(key, default)
        if not re.fullmatch(r"[0-9]{1,15}", str(found)) or int(found) < least:
            raise RecipeError(f"{key}={found!r} is not allowed; use a whole number, {least} or more.")
        return int(found)

    def number(self, key: str, default: float) -> float:
        """A key's value, a finite number, which YAML may have taken for text (``2.0e-5`` without a sign).

        Raises:
            RecipeError: it is something else.
        """
        found = self.take(key, default)
        try:
            number = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RecipeError(f"{key}={found!r} is not allowed; use a number.")
        return number

    def _model(self) -> tuple[str, str, bool]:
        target = str(self.take("model._target_", ""))
        if not target.endswith(".from_pretrained"):
            raise RecipeError(f"model._target_={target}: only from_pretrained is read; use pretrain for new weights.")
        named = str(self.take("model.pretrained_model_name_or_path", ""))
        revision = self.take("model.revision")
        for name, entry in catalog.CATALOG.items():
            for checkpoint, instruct in ((entry.base, False), (entry.instruct, True)):
                if checkpoint == named:
                    hub = "" if "://" in named else "hf://"
                    return name, f"{hub}{named}" + (f"@{revision}" if revision else ""), instruct
        folder = Path(named).expanduser()
        if not (folder / "config.json").is_file():
            known = dict.fromkeys(entry.base for entry in catalog.CATALOG.values() if entry.base)
            raise RecipeError(
                f"model.pretrained_model_name_or_path={named}: is no Mixtral that has a recipe ({', '.join(known)}, "
                "their Instruct variants, or a folder with a config.json)."
            )
        return _recipe_of_folder(folder), str(folder), False

    def _processes(self, num_nodes: int | None, gpus: int | None) -> tuple[int | None, int | None]:
        if self.take("distributed.dp_size") is None or num_nodes or gpus:
            return num_nodes, gpus
        world = self._size("dp") * self._size("tp") * self._size("pp") * self._size("cp")
        return (1, world) if world <= 8 else (-(-world // 8), 8)

    def _size(self, letter: str) -> int:
        return self.whole(f"distributed.{letter}_size", 1)

    def _scheme(self) -> str:
        if self.take("peft._target_") is None:
            return "none"
        return "dora" if self.take("peft.use_dora") else "lora"

    def _data(self, replaced: Any, packed: int) -> Any:
        """The data module, with the recipe's batch where the file says nothing."""
        target = _short_name(self.take("dataset._target_", ""))
        roots = map(self.take, ("dataset.dataset_name", "dataset.path_or_dataset", "dataset.path_or_dataset_id"))
        root = next(filter(None, roots), None)
        if isinstance(root, list):
            raise RecipeError("dataset: give one data set, a file or a folder, not a list.")
        root = f"{root}:{self.take('dataset.name')}" if self.take("dataset.name") else root
        if target == "make_squad_dataset":
            config = run.Config(_class("SquadDataModule"), dataset_root=None if root in _SQUAD else root)
        elif target in ("ColumnMappedTextInstructionDataset", "ColumnMappedTextInstructionIterableDataset"):
            config = self._columns(root)
        elif target == "ChatDataset":
            template = self.take("dataset.chat_template")
            config = run.Config(_class("ChatDataModule"), dataset_root=root, chat_template=template)
        elif target.startswith("Mock") or target.startswith("build_unpacked"):
            samples = self.whole("dataset.num_samples", 10_000_000)
            vocab = self.take("dataset.vocab_size")
            config = run.Config(_class("MockDataModule"), num_train_samples=samples, vocab_size=vocab)
        else:
            known = "make_squad_dataset, ColumnMappedTextInstructionDataset, ChatDataset, MockIterableDataset"
            raise RecipeError(f"dataset._target_={target}: is not read; use one of {known}, or finetune --data.")
        if packed:
            specs = run.Config(_class("PackedSequenceSpecs"), packed_sequence_size=packed)
            config.packed_sequence_specs, config.seq_length = specs, packed
        length = self.whole("dataset.seq_length", 0, least=0) or self.whole("dataset.seq_len", 0, least=0)
        if length and not packed:
            config.seq_length = length
        if target == "make_squad_dataset" and self.take("dataset.chat_template"):
            raise RecipeError("dataset.chat_template: SQuAD is asked as plain text; use a data set of messages.")
        return overrides.with_batch_of(replaced, config)

    def _columns(self, root: Any) -> Any:
        columns = {key: self.take(f"dataset.column_mapping.{key}") for key in ("context", "question", "answer")}
        given = {key: str(value) for key, value in columns.items() if value}
        if "answer" not in given or len(given) == 1:
            raise RecipeError("dataset.column_mapping: needs answer, and context or question.")
        names = {("output" if key == "answer" else key): column for key, column in given.items()}
        return run.Config(
            _class("FineTuningDataModule"),
            dataset_root=root,
            columns=names,
            prompt_template=" ".join(f"{{{name}}}" for name in names),
            dataset_kwargs={"answer_only_loss": bool(self.take("dataset.answer_only_loss_mask", True))},
        )

    def _run(self, recipe: Any) -> None:
        """How long, how often, where to."""
        if self.take("step_scheduler.max_steps") is None:
            raise RecipeError("step_scheduler.max_steps is not set; epochs do not say how many steps a run takes.")
        settings = {
            "trainer.max_steps": self.take("step_scheduler.max_steps"),
            "data.global_batch_size": self.take("step_scheduler.global_batch_size"),
            "data.num_workers": self.take("dataloader.num_workers"),
            "log.ckpt.every_n_train_steps": self.take("step_scheduler.ckpt_every_steps"),
            "log.ckpt.save_top_k": self.take("checkpoint.max_recent_checkpoints"),
            "log.log_dir": self.take("checkpoint.checkpoint_dir"),
            "trainer.val_check_interval": self.take("step_scheduler.val_every_steps"),
            "trainer.log_every_n_steps": self.take("step_scheduler.log_remote_every_steps"),
            "trainer.strategy.ckpt_async_save": self.take("checkpoint.is_async"),
            "resume.resume_from_path": self.take("checkpoint.restore_from"),
            "model.config.moe_aux_loss_coeff": self.take("model.router_aux_loss_coef"),
        }
        seed = self.take("rng.seed", self.take("seed"))
        settings |= {"trainer.seed": seed, "data.seed": seed}
        for logger in _LOGGERS:
            values = {f"log.{logger}.{name}": self.take(f"{logger}.{name}") for name in _LOGGERS[logger]}
            settings |= values if self.take(f"{logger}.enable", True) else {}
        for path, value in settings.items():
            if value is not None:
                overrides.set_value(recipe, path, value)
        if "validation_dataset" in self._given and self.take("validation_dataset") is None:
            recipe.trainer.val_check_interval = 0
        if not self.take("checkpoint.enabled", True):
            recipe.log.ckpt.every_n_train_steps, recipe.log.ckpt.save_last, recipe.log.ckpt.save_top_k = None, False, 0
        if self.take("step_scheduler.gc_every_steps") is not None:
            interval = self.whole("step_scheduler.gc_every_steps", 0, least=0)
            callback = run.Config(_class("GarbageCollectionCallback"), gc_interval_train=interval)
            recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), callback]
        precision = _short_name(self.take("model.torch_dtype", "bf16"))
        if precision in ("float32", "fp32"):
            recipe.trainer.plugins.precision, recipe.trainer.strategy.pipeline_dtype = "32", None
        elif precision not in ("bf16", "bfloat16", "auto"):
            raise RecipeError(f"model.torch_dtype={precision}: use bf16 or float32.")

    def _optimizer(self, recipe: Any) -> None:
        target = _short_name(self.take("optimizer._target_", "Adam"))
        loss = _short_name(self.take("loss_fn._target_", "MaskedCrossEntropy"))
        if target not in ("Adam", "AdamW", "FusedAdam"):
            raise RecipeError(f"optimizer._target_={target}: use torch.optim.Adam or torch.optim.AdamW.")
        if not loss.endswith("CrossEntropy"):
            raise RecipeError(f"loss_fn._target_={loss}: the loss is cross-entropy; leave it out.")
        betas = self.take("optimizer.betas", [0.9, 0.999])
        if not isinstance(betas, list) or len(betas) != 2:
            raise RecipeError(f"optimizer.betas={betas!r} is not allowed; use two numbers, such as [0.9, 0.999].")
        beta1, beta2 = betas
        lr = self.number("optimizer.lr", 1e-3)  # torch's default, as the next ones
        steps = self.whole("step_scheduler.max_steps", 0)
        config = {
            "lr": lr,
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_eps": self.take("optimizer.eps", 1e-8),
            "weight_decay": self.take("optimizer.weight_decay", 0.01 if target == "AdamW" else 0.0),
            "clip_grad": self.take("clip_grad_norm.max_norm", 1.0),
            "decoupled_weight_decay": target != "Adam",
        }
        for name, value in config.items():
            overrides.set_value(recipe, f"optim.config.{name}", value)
        schedule = any(key.startswith("lr_scheduler.") for key in self._given)
        style = self.take("lr_scheduler.lr_decay_style", "cosine" if schedule else "constant")
        names = {
            "cosine": "CosineAnnealingScheduler",
            "linear": "WarmupAnnealingScheduler",
            "constant": "WarmupPolicyScheduler",
        }
        if style not in names:
            raise RecipeError(f"lr_scheduler.lr_decay_style={style!r}: use {', '.join(names)}.")
        recipe.optim.lr_scheduler = run.Config(
            _class(names[style]),
            warmup_steps=self.whole("lr_scheduler.lr_warmup_steps", min(1000, steps // 10) if schedule else 0, least=0),
            min_lr=self.number("lr_scheduler.min_lr", 0.01 * lr),
            max_steps=self.take("lr_scheduler.lr_decay_steps"),
        )

    def _adapters(self, recipe: Any) -> None:
        if recipe.peft is None:
            return
        settings = {
            "dim": self.take("peft.dim", 8),
            "alpha": self.take("peft.alpha", 32),
            "dropout": self.take("peft.dropout", 0.0),
            "dropout_position": self.take("peft.dropout_position", "post"),
            "lora_A_init_method": self.take("peft.lora_A_init", "xavier"),
            "lora_dtype": self.take("peft.lora_dtype"),
            "target_modules": self._linears("target_modules"),
            "exclude_modules": self._linears("exclude_modules"),
        }
        if self.take("peft.match_all_linear"):
            settings["target_modules"] = sorted(set(_LINEARS.values()))
        if not settings["target_modules"]:
            raise RecipeError("peft: names no layers; give target_modules or match_all_linear.")
        for name, value in settings.items():
            overrides.set_value(recipe, f"peft.{name}", value)

    def _linears(self, key: str) -> list[str]:
        """Megatron's layers among patterns of Hugging Face's names; embeddings, router and head have no adapters."""
        patterns = self.take(f"peft.{key}", [])
        found: list[str] = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            ending = str(pattern).rpartition(".")[2]
            matched = [layer for name, layer in _LINEARS.items() if fnmatch.fnmatch(name, ending)]
            if not matched and key == "target_modules":
                raise RecipeError(f"peft.{key}={pattern}: is no linear layer of a Mixtral ({', '.join(_LINEARS)}).")
            found += matched
        return list(dict.fromkeys(found))

    def _layout(self, recipe: Any, packed: bool) -> None:
        """Parallel sizes and microbatches."""
        strategy, trainer = recipe.trainer.strategy, recipe.trainer
        tp, pp, cp = (self._size(letter) for letter in ("tp", "pp", "cp"))
        strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size = tp, pp
        strategy.context_parallel_size = cp
        strategy.expert_tensor_parallel_size = 1
        strategy.sequence_parallel = tp > 1
        if not self.take("distributed.sequence_parallel", False) and tp > 1:
            self.notes.append("Sequence parallelism is on: Megatron's MoE layer needs it where tp_size > 1.")
        strategy.virtual_pipeline_model_parallel_size = self._chunks(recipe.model.config.num_layers, pp)
        if pp == 1:
            strategy.pipeline_dtype = None
        if self.take("distributed.activation_checkpointing"):
            config = recipe.model.config
            config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
        local = self.whole("step_scheduler.local_batch_size", 1)
        micro = self.whole("distributed.pipeline.pp_microbatch_size", 1)
        recipe.data.micro_batch_size = 1 if packed else micro if pp > 1 else local
        if packed and (local > 1 or micro > 1):
            self.notes.append("Packs go through one by one, whatever step_scheduler.local_batch_size says.")
        self._experts(trainer)

    def _chunks(self, num_layers: int, pp: int) -> int | None:
        """Interleaved chunks per pipeline rank."""
        schedule = str(self.take("distributed.pipeline.pp_schedule", "1f1b")).lower()
        stage = self.whole("distributed.pipeline.layers_per_stage", 0, least=0)
        if pp == 1 or schedule == "1f1b":
            return None
        if schedule != "interleaved1f1b":
            raise RecipeError(f"distributed.pipeline.pp_schedule={schedule}: use 1f1b or interleaved1f1b.")
        return num_layers // (pp * stage) if stage else 2  # AutoModel's default: two stages a rank

    def _experts(self, trainer: Any) -> None:
        """Spread the experts as the file says, else over as many ranks as there are: FSDP would have sharded them."""
        asked = self.whole("distributed.ep_size", 0, least=0)
        world = trainer.num_nodes * trainer.devices
        most = world // trainer.strategy.pipeline_model_parallel_size
        trainer.strategy.expert_model_parallel_size = asked or math.gcd(8, max(most, 1))

    def _make_it_fit(self, recipe: Any, hardware: str, nodes: int | None) -> None:
        """What the file leaves open: the fewest nodes on which the layout divides and fits, and with them microbatches.

        Smaller microbatches change nothing but speed: the global batch stays.
        """
        trainer, card, asked = recipe.trainer, cards.card(hardware), recipe.data.micro_batch_size
        choices = [nodes] if nodes else [2**power for power in range(_MOST_NODES.bit_length())]
        sizes = [asked >> power for power in range(asked.bit_length())]
        before = trainer.num_nodes
        for count, size in itertools.product(choices, sizes):
            trainer.num_nodes, recipe.data.micro_batch_size = count, size
            self._experts(trainer)
            job = Workload.of(recipe)
            if not violations(job.topology, job.shape, job.batch) and memory.of_job(job, card).fits:
                break
        else:  # preflight says what is wrong
            trainer.num_nodes, recipe.data.micro_batch_size = before, asked
            self._experts(trainer)
            return
        if nodes is None:
            where = f"{trainer.num_nodes} node(s) x {trainer.devices} {card.title}"
            self.notes.append(f"{where}: the file states none; --num-nodes and --nproc-per-node do.")
        if recipe.data.micro_batch_size != asked:
            self.notes.append(f"{recipe.data.micro_batch_size} sequence(s) at once, not {asked}, so that they fit.")


def _recipe_of_folder(folder: Path) -> str:
    """The recipe of a local checkpoint, by its sizes."""
    config = read_object(folder / "config.json", RecipeError)
    sizes = (config.get("num_hidden_layers"), config.get("hidden_size"))
    for name, entry in catalog.CATALOG.items():
        if (entry.shape.num_layers, entry.shape.hidden_size) == sizes:
            return name
    raise RecipeError(
        f"model.pretrained_model_name_or_path={folder}: {sizes[0]} layers of width {sizes[1]} are no recipe's."
    )


def _class(name: str) -> Any:
    return classes.find(name, "classes", name)


def _leaves(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted key; a section that is empty or none is one."""
    for key, value in data.items():
        where = f"{path}{key}"
        section = any(known.startswith(f"{where}.") for known in KEYS)
        if section and where not in KEYS and _plain(value) is None:
            continue  # a section that is left out
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{where}.")
        else:
            yield where, value


def _plain(value: Any) -> Any:
    """AutoModel's reading of text: ``none`` and numbers; variables of the environment are not filled in."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, str):
        return value if value != {} else None
    if "$" in value:
        raise RecipeError(f"{value}: variables are not filled in; write the value out.")
    if value.lower() in ("none", "null", ""):
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _short_name(value: Any) -> Any:
    """The last part of a dotted target."""
    return value.rpartition(".")[2] if isinstance(value, str) and "/" not in value else value
