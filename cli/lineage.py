"""``mixtral-recipes lineage``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli.options.checkpoint import Base
from mixtral_recipes.cli.options.groups import argument, option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.options.runs import complete_run
from mixtral_recipes.cli.output import note, print_json, print_table, table
from mixtral_recipes.executors.runs.checkpoints import base_folder, checkpoint_folder

_STATES = {"ok": "ok", "wrong": "WRONG", "absent": "not here", "named": "named by commit"}


def command(
    *,
    path: Annotated[
        str,
        argument(
            "PATH",
            "A checkpoint, an exported folder or .gguf file, nemo://ID, or a run: its newest complete checkpoint.",
            autocompletion=complete_run,
        ),
    ],
    base: Base = None,
    quick: Annotated[
        bool, option("--quick", "Do not read the weights: compare only recorded hashes, sizes and small files.")
    ] = False,
    json: Json = False,
) -> None:
    """Follow a model back to its source, and compare every link.

    Each folder's content is compared with what the one made from it recorded: weights, config, tokenizer and history. A
    link that is not what it was ends the command with code 2; one that is no longer here is told from the record.
    """
    from mixtral_recipes.checkpoints.lineage import told
    from mixtral_recipes.checkpoints.lineage.chain import Follower

    folder = _folder(path)
    follower = Follower(_tensors, hashes=not quick, base=base_folder(base), say=note)
    links = follower.follow(folder)
    rows: list[dict[str, Any]] = [
        told.row(link.record) | {"state": link.state, "where": str(link.path or ""), "role": link.role}
        for link in links
    ]
    shown = [(*(row[name] for name in told.COLUMNS), _STATES[row["state"]], row["where"]) for row in rows]
    print_table(table((*told.COLUMNS, "state", "where"), shown))
    wrong = [link for link in links if link.state == "wrong"]
    for link in wrong:
        note(f"error: {link.record.kind} ({told.what(link.record)}): {link.detail}")
    if json:
        details = [
            row | {"detail": link.detail, "identity": vars(link.record.identity), "data": link.record.data or None}
            for row, link in zip(rows, links, strict=True)
        ]
        print_json({"path": str(folder), "matches": not wrong, "weights_read": not quick, "links": details})
    if wrong:
        raise typer.Exit(2)


def _tensors(path: Path, hashes: bool, dtypes: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    """The tensors of a model folder, or of a GGUF file."""
    if path.is_file():
        from mixtral_recipes.importers.gguf.reader import StoredFile

        return StoredFile(path).entries(hashes=hashes)
    from mixtral_recipes.importers.convert.tensor_hashes import tensors_of

    return tensors_of(path, hashes, dtypes)


def _folder(text: str) -> Path:
    """A folder or file with a lineage, such as an export; or a checkpoint or run."""
    from mixtral_recipes.checkpoints.lineage.record import place_of

    path = Path(text).expanduser()
    return path.resolve() if place_of(path).is_file() else checkpoint_folder(text)
