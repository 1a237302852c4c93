"""Write one checkpoint: every rank its own file, rank 0 the rest, and the name only when all of it is there.

Everything here can run in a thread beside training. The ranks tell each other how far they have got through
torch.distributed's key-value store and never through collectives, so training's own can't be disturbed.
"""

import dataclasses
import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_store

from mixtral_recipes.checkpoints.format.manifest import Kind, file_entries, write_manifest
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import WrittenFile, write_file, write_metadata
from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_files
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem, MixtralRecipesError, of_the_machine
from mixtral_recipes.system.files import copy_folder, replacing_folder, size_of, staging_path
from mixtral_recipes.system.ranks import rank_and_size

_ALIGNMENT = 64
_ROOM_FOR_THE_REST = 1 << 16  # metadata, manifest, run.json
_ITEM_OVERHEAD = 1536  # torch.save's frame, a line of .metadata


@dataclass
class Destination:
    """A checkpoint to be written.

    Attributes:
        final: Its folder.
        kind: For its manifest.
        run_facts: For context/run.json.
        lineage: For lineage.json; its identity is filled in when the files are there.
        context: Folder whose files go into context/; None has none.
        nbytes: How large its tensors are, over all ranks.
        items: How many there are, over all ranks.
    """

    final: Path
    kind: Kind
    run_facts: dict[str, Any]
    lineage: Lineage
    context: Path | None
    nbytes: int
    items: int

    @property
    def needed(self) -> int:
        """Roughly how many bytes it takes on disk."""
        beside = size_of(self.context) if self.context else 0
        return self.nbytes + self.items * _ITEM_OVERHEAD + beside + _ROOM_FOR_THE_REST


class HostCopy:
    """Memory on the host that tensors are copied into before they are written; kept from one save to the next."""

    def __init__(self, shards: list[Shard]) -> None:
        """Allocate and touch it, so that the first save does not pay for that."""
        starts, total = [], 0
        for shard in shards:
            starts.append(total)
            total += -(-shard.nbytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(shard.tensor.is_cuda for shard in shards)
        memory = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu).zero_()
        self._sources = [shard.tensor for shard in shards]
        self._copies = [
            memory[start : start + shard.nbytes].view(shard.tensor.dtype).view(shard.tensor.shape)
            for start, shard in zip(starts, shards, strict=True)
        ]
        self.shards = [
            Shard(s.key, copy, s.offsets, s.sizes, s.whole, s.padded)
            for s, copy in zip(shards, self._copies, strict=True)
        ]
        self._on_gpu = on_gpu

    def take(self) -> list[Shard]:
        """Copy the tensors as they are now; the only part of an asynchronous save that training waits for."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._sources, non_blocking=self._on_gpu)  # pyright: ignore[reportPrivateImportUsage]
        if self._on_gpu:
            torch.cuda.synchronize()
        return self.shards


@dataclass
class _Failure:
    text: str
    user_can_mend: bool

    def error(self) -> MixtralRecipesError:
        return (EnvironmentProblem if self.user_can_mend else CheckpointError)(self.text)


@dataclass
class Save:
    """One save, the same object on every rank.

    Attributes:
        number: Counts the saves of this process; names this one among the ranks.
        destination: What is written.
        shards: This rank's tensors to write.
        objects: This rank's objects to write.
        make_room: Called on rank 0 with the bytes needed, before anything is written; may delete or raise.
        published: Called on rank 0 once the checkpoint has its name.
    """

    number: int
    destination: Destination
    shards: list[Shard]
    objects: dict[str, bytes]
    make_room: Callable[[int], None]
    published: Callable[[Path], None]
    _outcome: Path | _Failure | None = None
    _thread: threading.Thread | None = None
    _store: Any = field(default_factory=_get_default_store)

    def start(self) -> None:
        """Write in the background."""
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        """Whether this rank knows the outcome."""
        return self._outcome is not None

    def run(self) -> None:
        """Write, and learn the outcome."""
        rank, size = rank_and_size()
        try:
            if rank == 0:
                outcome = self._lead(size)
                self._tell("outcome", outcome)
                self._close(size)
            else:
                outcome = self._follow(rank)
                self._tell(f"heard {rank}", None)
        except BaseException as error:
            outcome = _failure(error)
        self._outcome = outcome

    def result(self) -> Path:
        """Wait for the outcome.

        Raises:
            EnvironmentProblem: the disk is full, or cannot be written.
            CheckpointError: it failed otherwise.
        """
        if self._thread is not None:
            self._thread.join()
        if isinstance(self._outcome, Path):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome.error()

    def _lead(self, size: int) -> Path | _Failure:
        """Rank 0: make the folder, write, wait for the others, publish."""
        final = self.destination.final
        begun = False
        try:
            with replacing_folder(final) as staging:  # also where the same step is saved again, after a fallback
                self._prepare(staging)
                self._tell("go", None)
                begun = True
                reports = [self._write(staging, 0), *(self._ask(f"rank {other}") for other in range(1, size))]
                for report in reports:
                    if isinstance(report, _Failure):
                        raise report.error()
                self._complete(staging, reports)
            self.published(final)
            return final
        except BaseException as error:
            failure = _failure(error)
            return self._explain(failure) if begun else failure

    def _follow(self, rank: int) -> Path | _Failure:
        if self._ask("go", "outcome") == "outcome":
            return self._ask("outcome")
        self._tell(f"rank {rank}", self._write(staging_path(self.destination.final), rank))
        return self._ask("outcome")

    def _prepare(self, staging: Path) -> None:
        needed = self.destination.needed
        self.make_room(needed)
        free = shutil.disk_usage(staging.parent).free
        if free < needed:
            raise EnvironmentProblem(self._too_full(free))
        (staging / "weights").mkdir()

    def _write(self, staging: Path, rank: int) -> WrittenFile | _Failure:
        try:
            return write_file(staging / "weights", rank, self.shards, self.objects)
        except BaseException as error:
            return _failure(error, rank)

    def _complete(self, staging: Path, files: list[WrittenFile]) -> None:
        """Write everything but the ranks' files, the manifest last."""
        context = staging / "context"
        write_metadata(staging / "weights", files)
        if self.destination.context is not None:
            copy_folder(self.destination.context, context)
        context.mkdir(exist_ok=True)
        (context / "run.json").write_text(json.dumps(self.destination.run_facts, indent=1) + "\n")
        source = {key: self.destination.run_facts.get(key) for key in ("run", "step")}
        known = {f"weights/{file.name}": file.pieces for file in files}
        identity = Identity.of(hash_of_files(file_entries(staging, known)), context)
        record.write(staging, dataclasses.replace(self.destination.lineage, identity=identity))
        write_manifest(staging, self.destination.kind, source=source, known=known)

    def _explain(self, failure: _Failure) -> _Failure:
        """Say how much room is missing if the disk filled up while we were writing."""
        free = shutil.disk_usage(self.destination.final.parent).free
        if failure.user_can_mend and free < self.destination.needed:
            return _Failure(self._too_full(free), True)
        return failure

    def _too_full(self, free: int) -> str:
        needed = self.destination.needed
        return (
            f"{self.destination.final}: not saved, because the disk is too full: {_megabytes(needed)} needed, "
            f"{_megabytes(free)} free, {_megabytes(needed - free)} missing; free some space, or lower "
            "log.ckpt.save_top_k or log.ckpt.max_disk_gb."
        )

    def _tell(self, what: str, value: Any) -> None:
        self._store.set(f"checkpoint {self.number} {what}", pickle.dumps(value))

    def _close(self, size: int) -> None:
        """Wait until every rank has heard the outcome, since the store may live in this process; then clear it."""
        others = range(1, size)
        for other in others:
            self._ask(f"heard {other}")
        told = ["go", "outcome", *(f"{word} {other}" for other in others for word in ("rank", "heard"))]
        for name in told:
            self._store.delete_key(f"checkpoint {self.number} {name}")

    def _ask(self, *names: str) -> Any:
        """What a rank reported under a name; with several names, the one reported first."""
        pause = 0.001
        while True:
            for name in names:
                key = f"checkpoint {self.number} {name}"
                if self._store.check([key]):
                    return pickle.loads(self._store.get(key)) if len(names) == 1 else name
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)


def _failure(error: BaseException, rank: int | None = None) -> _Failure:
    who = "" if rank is None else f"rank {rank}: "
    if isinstance(error, MixtralRecipesError):
        return _Failure(str(error), isinstance(error, EnvironmentProblem))
    problem = of_the_machine(error)
    why = problem or f"{type(error).__name__}: {error}."
    return _Failure(f"{who}the checkpoint was not saved: {why}", problem is not None)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.2f} GB"
