"""Training checkpoints: what is saved, what is kept, and how a run resumes from it.

A checkpoint is a folder: ``weights/`` (torch_dist: model or adapters, optimizer, schedule, random state), ``context/``
(the model's config.json, tokenizer files, ``run.json``) and ``manifest.json``. It has its name only when complete, and
every layout can read it.
"""

import contextlib
import dataclasses
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import retention
from mixtral_recipes.checkpoints.folder import facts_or_none, list_checkpoints, read_run_facts
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import torch_bytes
from mixtral_recipes.checkpoints.fp8 import fp8_key, fp8_state, set_fp8_state, take_all
from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.save import Destination, HostCopy, Save
from mixtral_recipes.checkpoints.shards import model_shards, optimizer_shards, parts_of, write_shares
from mixtral_recipes.checkpoints.state import (
    allocate_state,
    random_key,
    random_state,
    set_random_state,
    set_steps,
)
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.system.files import now, remove_folder, size_of
from mixtral_recipes.system.ranks import gathered, rank_and_size

LATEST = "latest"
_COMMON = "common_state/shard_0_1"  # as Megatron names its one shared object


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: Steps made, skipped ones included.
        consumed_samples: Samples taken from the data's stream.
        skipped_steps: Steps left out because their loss or gradient was not finite.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0


@dataclass(kw_only=True, eq=False)
class Checkpointer:
    """Saves and restores one run's whole state.

    Attributes:
        folder: Where this run's checkpoints are.
        policy: When they are written and which are kept.
        model_name: Fills ``{model_name}`` in folder names.
        model: This rank's chunks, without DDP.
        optimizer: Megatron's optimizer.
        scheduler: Megatron's schedule.
        adapters_only: Whether only adapters are trained and saved.
        context: Folder whose files every checkpoint carries.
        facts: What run.json says besides the position.
        lineage: What lineage.json says besides position and identity.
        asynchronous: Whether files are written beside training.
    """

    folder: Path = field(kw_only=False)
    policy: ModelCheckpoint = field(kw_only=False)
    model_name: str
    model: list[Any]
    optimizer: Any
    scheduler: Any
    adapters_only: bool
    context: Path | None
    facts: dict[str, Any]
    lineage: Lineage = field(default_factory=lambda: Lineage("training", Identity()))
    asynchronous: bool = False

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._mine: list[Shard] | None = None
        self._host: HostCopy | None = None
        self._total = (0, 0)  # bytes and items of a checkpoint, over all ranks
        self._pending: Save | None = None
        self._steps_before = 0  # Adam's, in the run whose optimizer this one began with

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors this rank writes; known after `prepare`."""
        return sum(shard.nbytes for shard in self._mine or [])

    def prepare(self) -> None:
        """Decide which rank writes what, and make room for the copy; all ranks call it together, once."""
        if self._mine is not None:
            return
        shards = self._shards()
        held = [(shard.place, shard.nbytes) for shard in shards]
        places = gathered(held)
        rank, _ = rank_and_size()
        share = write_shares(places)[rank]
        self._mine = [shard for shard in shards if shard.place in share]
        sizes = dict(itertools.chain.from_iterable(places))
        self._total = (sum(sizes.values()), len(sizes))
        if self.asynchronous:
            self._host = HostCopy(self._mine)

    def _shards(self) -> list[Shard]:
        allocate_state(self.optimizer)
        model = model_shards(self.model, adapters_only=self.adapters_only)
        return model + optimizer_shards(self.optimizer, self.model, adapters_only=self.adapters_only)

    def save(self, position: Position, metrics: dict[str, float]) -> Path:
        """Begin to save, and finish unless saves are asynchronous; all ranks call it together.

        Returns:
            The folder it will be, or is.

        Raises:
            EnvironmentProblem: this save, or the one before, could not be written.
        """
        self.prepare()
        self.wait()
        assert self._mine is not None
        destination = self._destination(position, metrics)
        take_all(shard.stand_in for shard in self._mine)
        shards = self._host.take() if self._host is not None else self._mine
        self._pending = Save(
            next(self._numbers), destination, shards, self._objects(), self._make_room, self._published
        )
        if self.asynchronous:
            self._pending.start()
        else:
            self._pending.run()
            self.wait()
        return destination.final

    def saving(self) -> bool:
        """Whether a save has begun and has not been waited for."""
        return self._pending is not None

    def unfinished(self) -> bool:
        """Whether this rank does not know yet how an asynchronous save ended."""
        return self._pending is not None and not self._pending.ended()

    def wait(self) -> Path | None:
        """Wait for the checkpoint being written and return it; None if there is none. All ranks call it together.

        Raises:
            EnvironmentProblem: it could not be written.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def _destination(self, position: Position, metrics: dict[str, float]) -> Destination:
        name = self.policy.folder_name(
            self.model_name, position.step, position.consumed_samples, metrics.get("val_loss")
        )
        run_facts = {
            "run": self.model_name,
            **dataclasses.asdict(position),
            "world_size": rank_and_size()[1],
            "metrics": metrics,
            **self.facts,
        }
        kind = "adapter" if self.adapters_only else "training"
        run = {"name": self.model_name, "step": position.step, "consumed_samples": position.consumed_samples}
        lineage = dataclasses.replace(self.lineage, kind=kind, run=run, created=now())
        return Destination(self.folder / name, kind, run_facts, lineage, self.context, *self._total)

    def _objects(self) -> dict[str, bytes]:
        rank, size = rank_and_size()
        objects = {random_key(rank, size): torch_bytes([random_state()])}
        scaling = fp8_state(self.model)
        if scaling:
            objects[fp8_key(rank, size)] = torch_bytes([scaling])
        if rank == 0:
            scalers = [part.grad_scaler for part in parts_of(self.optimizer) if getattr(part, "grad_scaler", None)]
            common = {
                "scheduler": self.scheduler.state_dict(),
                "optimizer": {"step": self._steps_before + self.scheduler.num_steps},
                "grad_scaler": scalers[0].state_dict() if scalers else None,
            }
            objects[_COMMON] = torch_bytes([common])
        return objects

    def _make_room(self, needed: int) -> None:
        if self.policy.max_disk_gb is not None:
            for kept in retention.to_make_room(self._kept(), needed, int(self.policy.max_disk_gb * 1e9)):
                remove_folder(kept.path)

    def _published(self, final: Path) -> None:
        with contextlib.suppress(OSError):  # not every disk has links, and nothing here follows this one
            link = self.folder / f".{LATEST}"
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            os.replace(link, self.folder / LATEST)
        retention.remove_unused(retention.surplus(self._kept(), self.policy.save_top_k))

    def _kept(self) -> list[retention.Kept]:
        return [self._judge(path) for path in list_checkpoints(self.folder) if facts_or_none(path)]

    def _judge(self, path: Path) -> retention.Kept:
        facts = read_run_facts(path)
        value = facts.get("metrics", {}).get(self.policy.monitor)
        sign = 1 if self.policy.mode == "min" else -1
        size = size_of(path) if self.policy.max_disk_gb is not None else 0
        return retention.Kept(path, facts["step"], float("inf") if value is None else sign * value, size)

    def load(self, checkpoint: Path) -> Position:
        """Restore a checkpoint of this run, from any layout; its files must have been verified.

        The random state is restored when as many processes run as did; otherwise it continues from the seed.
        """
        facts = read_run_facts(checkpoint)
        stored = StoredWeights(checkpoint / "weights")
        allocate_state(self.optimizer)
        stored.read_into(model_shards(self.model, adapters_only=self.adapters_only))
        # After the weights: the optimizer may keep its own as what theirs leave over (`remainders`).
        stored.read_into(optimizer_shards(self.optimizer, self.model, adapters_only=self.adapters_only))
        (common,) = stored.read_object(_COMMON)
        set_steps(self.optimizer, common["optimizer"]["step"])
        self._steps_before = common["optimizer"]["step"] - common["scheduler"]["num_steps"]
        for part in parts_of(self.optimizer):
            if common["grad_scaler"] and getattr(part, "grad_scaler", None):
                part.grad_scaler.load_state_dict(common["grad_scaler"])
        # The recipe's schedule, at the checkpoint's step: what was changed in the recipe since takes effect.
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=common["scheduler"]["num_steps"])
        rank, size = rank_and_size()
        if facts["world_size"] == size:
            set_random_state(stored.read_object(random_key(rank, size))[0])
        if facts.get("topology") == self.facts.get("topology") and fp8_key(rank, size) in stored:
            set_fp8_state(self.model, stored.read_object(fp8_key(rank, size))[0])
        return Position(facts["step"], facts["consumed_samples"], facts.get("skipped_steps", 0))

    def load_optimizer(self, checkpoint: Path) -> None:
        """Take only the optimizer's moments and step count from another run's checkpoint.

        Raises:
            CheckpointError: it has none, like imports and sums of adapters.
        """
        stored = StoredWeights(checkpoint / "weights")
        if not stored.has_optimizer:
            raise CheckpointError(
                f"{checkpoint} has no optimizer state (imports and sums of adapters have none); leave out "
                "resume.restore_config.load_optim_state."
            )
        allocate_state(self.optimizer)
        shards = optimizer_shards(self.optimizer, self.model, adapters_only=self.adapters_only)
        stored.read_into(shards)
        self._steps_before = stored.read_object(_COMMON)[0]["optimizer"]["step"]
        set_steps(self.optimizer, self._steps_before)
