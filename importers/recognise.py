"""What a folder holds, told by the files in it: one answer for import, verify, export and --restore-from.

Only names are looked at, and of two small files a few bytes; what is in the files is the business of whoever reads the
form. Nothing here loads torch.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mixtral_recipes.errors import CheckpointError, some_of
from mixtral_recipes.system.json_files import read_object

_SHOWN = 4  # names shown of a folder in an unknown format


class Form(StrEnum):
    """The forms told apart; the value is what a message calls one."""

    CHECKPOINT = "a mixtral-recipes checkpoint"
    QUANTIZED = "a quantised base, kept for QLoRA runs"
    UNFINISHED = "an unfinished checkpoint"
    RUN = "a run's folder"
    HF = "a Hugging Face model"
    MISTRAL = "a model in Mistral's own format"
    NEMO = "a NeMo 2.0 checkpoint"
    NEMO_ADAPTER = "a NeMo 2.0 adapter checkpoint"
    NEMO_1 = "a NeMo 1.0 model"
    PEFT = "a PEFT adapter"
    MISTRAL_LORA = "a mistral-finetune adapter"
    GGUF = "a GGUF model"
    MEGATRON_LEGACY = "a Megatron-LM checkpoint in the legacy format"
    MEGATRON = "a Megatron-LM distributed checkpoint"
    ZARR = "a distributed checkpoint in the zarr format"
    DCP = "a torch.distributed checkpoint"
    DEEPSPEED = "a DeepSpeed checkpoint"
    HUB_CACHE = "a model's folder in the Hub's cache"
    WEIGHT_FILES = "Hugging Face weight files without their config.json"
    TOKENIZER = "a tokenizer without a model"
    COLLECTION = "a folder of models, adapters or runs"
    EMPTY = "an empty folder"
    UNKNOWN = "in an unknown format"


_IMPORT_IT = "import it first: `mixtral-recipes import {folder}`"
_NO_MODEL_KNOWN = "its tensors do not name their model; convert it to a Hugging Face folder and import that"
# What to do with one that is not wanted here.
_ADVICE: dict[Form, str] = {
    Form.CHECKPOINT: "it is already imported; use it directly with export, verify and --restore-from",
    Form.QUANTIZED: "only runs use it (peft.cache); pass the model it was made from",
    Form.UNFINISHED: "it has no manifest.json, so it was never completely written; import or save it again",
    Form.RUN: "pass one of its checkpoints, such as {folder}/checkpoints/latest",
    Form.HF: _IMPORT_IT,
    Form.MISTRAL: _IMPORT_IT,
    Form.NEMO: "import it first: `mixtral-recipes import nemo://{folder}`",
    Form.NEMO_ADAPTER: "import it first: `mixtral-recipes import nemo://{folder}`",
    Form.NEMO_1: "convert it with NeMo's scripts/checkpoint_converters/convert_nemo1_to_nemo2.py and import the result",
    Form.PEFT: "import it first: `mixtral-recipes import {folder} --base MODEL`",
    Form.MISTRAL_LORA: "merge it into its base with mistral-finetune and import the result",
    Form.GGUF: "its weights are rounded or reordered for llama.cpp; pass the model it was made from (for a file that "
    "mixtral-recipes exported, `mixtral-recipes lineage FILE` names the checkpoint)",
    Form.MEGATRON_LEGACY: "load it with Megatron-LM and save it with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save FOLDER, then import that",
    Form.MEGATRON: _IMPORT_IT,
    Form.ZARR: "save it again in the torch_dist format, with NeMo or Megatron",
    Form.DCP: _NO_MODEL_KNOWN,
    Form.DEEPSPEED: "merge its shards into the model's folder with its zero_to_fp32.py and import that",
    Form.HUB_CACHE: "pass hf://{repo}, or the folder of one revision under {folder}/snapshots",
    Form.WEIGHT_FILES: "put the model's config.json beside them",
    Form.TOKENIZER: "pass the folder that also has the weights",
    Form.COLLECTION: "pass one of the folders in it",
    Form.EMPTY: "pass the folder that has the weights",
    Form.UNKNOWN: "pass the folder that has the weights",
}


@dataclass(frozen=True)
class Found:
    """What a folder is.

    Attributes:
        form: Its form.
        folder: The folder itself: of a checkpoint whose ``weights`` or ``context`` was given, the one above.
        evidence: The files that say so.
    """

    form: Form
    folder: Path
    evidence: str

    def refusal(self, wanted: str) -> CheckpointError:
        """An error that names what was found and what to do with it.

        Args:
            wanted: What is needed instead, with its article.
        """
        repo = self.folder.name.removeprefix("models--").replace("--", "/")
        advice = _ADVICE[self.form].format(folder=self.folder, repo=repo)
        return CheckpointError(f"{self.folder} is {self.form} ({self.evidence}), not {wanted}; {advice}.")


def recognise(path: Path) -> Found:
    """Say what a folder (or a single file) holds.

    Raises:
        CheckpointError: there is nothing at that path.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist." if not path.exists() else f"{path} is not a folder.")
    if path.name in ("weights", "context") and _has_checkpoint_form(path.parent):
        path = path.parent
    for form, evidence_of in _TESTS:
        evidence = evidence_of(path)
        if evidence:
            return Found(form, path, evidence)
    return Found(Form.UNKNOWN, path, "it has " + _some(entry.name for entry in path.iterdir()))


def required(path: Path, *forms: Form, wanted: str = "") -> Found:
    """What a folder is, if it is of one of these forms.

    Args:
        path: The folder.
        forms: Those that will do.
        wanted: How an error calls them; empty takes the first one's name.

    Raises:
        CheckpointError: it is of another; the message says which, by which file, and what to do.
    """
    found = recognise(path)
    if found.form in forms:
        return found
    raise found.refusal(wanted or str(forms[0]))


def _file(path: Path) -> Found:
    for suffix, form in ((".gguf", Form.GGUF), (".nemo", Form.NEMO_1)):
        if path.suffix == suffix:
            return Found(form, path, f"a {suffix} file")
    return Found(Form.UNKNOWN, path, "a file")


def _has_checkpoint_form(folder: Path) -> bool:
    return (folder / "weights").is_dir() and ((folder / "context").is_dir() or (folder / "manifest.json").is_file())


def _some(names: Iterable[str]) -> str:
    return some_of(sorted(names), _SHOWN)


def _all_of(*patterns: str) -> Callable[[Path], str]:
    """Evidence where every pattern matches something: the first match of each."""

    def evidence(folder: Path) -> str:
        found = [next(iter(sorted(folder.glob(pattern))), None) for pattern in patterns]
        return ", ".join(str(path.relative_to(folder)) for path in found if path) if all(found) else ""

    return evidence


def _any_of(*patterns: str) -> Callable[[Path], str]:
    """Evidence where one pattern matches: the first match."""

    def evidence(folder: Path) -> str:
        return next((found for pattern in patterns if (found := _all_of(pattern)(folder))), "")

    return evidence


def _own(folder: Path, words: bytes = b"mixtral-recipes/") -> str:
    """A manifest.json that begins with these words among others."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return ""
    with manifest.open("rb") as file:
        return "manifest.json" if words in file.read(64) else ""


def _nemo(folder: Path) -> str:
    return _any_of("context/io.json", "context/model.yaml")(folder) if (folder / "weights").is_dir() else ""


def _hf(folder: Path) -> str:
    """A config.json, unless all the weights beside it are of another form."""
    if not (folder / "config.json").is_file():
        return ""
    if _transformers_weights(folder):
        return "config.json"
    in_mistrals = _mistral_weights(folder) and (folder / "params.json").is_file()
    others = (_gguf, _deepspeed, _dcp, _megatron)
    return "" if in_mistrals or any(of(folder) for of in others) else "config.json"


_transformers_weights = _any_of("model*.safetensors*", "pytorch_model*.bin*")
_gguf = _any_of("*.gguf")
_deepspeed = _any_of("zero_to_fp32.py", "global_step*/*_optim_states.pt", "*zero_pp_rank_*.pt")
_dcp = _any_of(".metadata", "*.distcp", "weights/.metadata", "*_fsdp_0/.metadata")  # the last: accelerate's FSDP
_megatron = _any_of("iter_*/.metadata", "release/.metadata", "latest_checkpointed_iteration.txt")
_mistral_weights = _any_of("consolidated*.safetensors", "consolidated.*.pth", "consolidated.*.pt")


def _mistral(folder: Path) -> str:
    names = (_any_of("params.json")(folder), _mistral_weights(folder))
    return ", ".join(name for name in names if name)


def _zarr(folder: Path) -> str:
    backend = folder / "metadata.json"
    try:
        named = backend.is_file() and read_object(backend, CheckpointError).get("sharded_backend") == "zarr"
    except (CheckpointError, OSError):
        named = False
    return "metadata.json" if named else _any_of("*/.zarray", "weights/*/.zarray")(folder)


def _hub_cache(folder: Path) -> str:
    return "snapshots" if re.match("models--", folder.name) and (folder / "snapshots").is_dir() else ""


def _collection(folder: Path) -> str:
    inside = [p for p in folder.iterdir() if p.is_dir() and any(test(p) for form, test in _TESTS if form in _COLLECTED)]
    return _some(path.name for path in inside)


_COLLECTED = (Form.CHECKPOINT, Form.HF, Form.MISTRAL, Form.NEMO, Form.PEFT, Form.RUN)
# In this order: the first that finds evidence decides.
_TESTS: tuple[tuple[Form, Callable[[Path], str]], ...] = (
    (Form.QUANTIZED, lambda folder: _own(folder, b'"kind": "quantized"')),
    (Form.CHECKPOINT, _own),
    (Form.NEMO_ADAPTER, _any_of("weights/adapter_metadata.json")),
    (Form.NEMO, _nemo),
    (Form.UNFINISHED, _all_of("weights/.metadata", "context/config.json")),
    (Form.RUN, _any_of("checkpoints/")),
    (Form.PEFT, _any_of("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")),
    (Form.MISTRAL_LORA, _any_of("lora.safetensors")),
    (Form.HF, _hf),
    (Form.MISTRAL, _mistral),
    (Form.NEMO_1, _any_of("model_config.yaml", "*.nemo")),
    (Form.GGUF, _gguf),
    (Form.DEEPSPEED, _deepspeed),
    (Form.MEGATRON_LEGACY, _any_of("mp_rank_*/model_optim_rng.pt", "iter_*/mp_rank_*/model_optim_rng.pt")),
    (Form.ZARR, _zarr),
    (Form.MEGATRON, _megatron),
    (Form.MEGATRON, _all_of(".metadata", "metadata.json")),  # Megatron's own; torch writes the former alone
    (Form.DCP, _dcp),
    (Form.HUB_CACHE, _hub_cache),
    (Form.WEIGHT_FILES, _any_of("*.safetensors", "pytorch_model*.bin", "*.bin")),
    (Form.TOKENIZER, _any_of("tokenizer.json", "tokenizer.model*", "tekken.json")),
    (Form.COLLECTION, _collection),
    (Form.EMPTY, lambda folder: "" if any(folder.iterdir()) else "no file"),
)
