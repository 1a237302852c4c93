"""``mixtral-recipes lineage``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli.options.checkpoint import Base, base_folder, checkpoint_folder
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.options.runs import complete_run
from mixtral_recipes.cli.output import note, print_json, print_table, table

_STATES = {"ok": "ok", "wrong": "WRONG", "absent": "not here", "named": "named by commit"}


def command(
    *,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint, an exported model folder, nemo://ID, or a run: its newest whole checkpoint.",
            autocompletion=complete_run,
        ),
    ],
    base: Base = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Leave the weights unread: compare recorded hashes, sizes and small files only."),
    ] = False,
    json: Json = False,
) -> None:
    """Follow a model back to its source, and compare every link.

    Each folder's content is compared with what the one made from it recorded: weights, config, tokenizer and history. A
    link that is not what it was ends the command with code 2; one that is no longer here is told from the record.
    """
    from mixtral_recipes.checkpoints.lineage import told
    from mixtral_recipes.checkpoints.lineage.chain import Follower
    from mixtral_recipes.importers.convert.tensor_hashes import tensors_of

    folder = _folder(path)
    follower = Follower(tensors_of, hashes=not quick, base=base_folder(base), say=note)
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


def _folder(text: str) -> Path:
    """A folder with a lineage, an export's too; or as every command takes a checkpoint."""
    from mixtral_recipes.checkpoints.lineage.record import NAME

    path = Path(text).expanduser()
    return path.resolve() if (path / NAME).is_file() else checkpoint_folder(text)
