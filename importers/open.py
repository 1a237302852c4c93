"""Open a model folder of any form that can be imported."""

from pathlib import Path

from mixtral_recipes.importers.hf.source import Source, open_source
from mixtral_recipes.importers.recognise import Form, required

IMPORTABLE = (Form.HF, Form.MISTRAL, Form.NEMO, Form.MEGATRON)
WANTED = "a Hugging Face model, one in Mistral's own format, or a NeMo 2.0 or Megatron-LM checkpoint"


def open_model(folder: Path, *, by_library: bool = False) -> Source:
    """Open a model that can be imported, whatever its form.

    Args:
        folder: The folder.
        by_library: Whether the libraries of the formats read the tensors, not our own readers; the folder was opened
            without it before. A checkpoint of NeMo 2.0 or Megatron-LM is read as ever.

    Raises:
        CheckpointError: the folder is of another form, or a file, tensor or field in it is missing or wrong.
    """
    found = required(folder, *IMPORTABLE, wanted=WANTED)
    if found.form is Form.MISTRAL:
        from mixtral_recipes.importers.hf.mistral import open_mistral

        return open_mistral(found.folder, by_library=by_library)
    if found.form is Form.NEMO:
        from mixtral_recipes.importers.nemo.source import open_nemo

        return open_nemo(found.folder)
    if found.form is Form.MEGATRON:
        from mixtral_recipes.importers.megatron_lm import open_megatron_lm

        return open_megatron_lm(found.folder)
    return open_source(found.folder, by_library=by_library)
