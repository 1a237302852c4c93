"""`mixtral-recipes migrate`: what changes in a script or notebook that was written for NeMo."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

from mixtral_recipes.cli.options.checkpoint import Overwrite
from mixtral_recipes.cli.options.groups import argument, option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import note, print_json, say


def command(
    *,
    script: Annotated[Path, argument("SCRIPT", "A Python file, a notebook, or a folder of them.")],
    write: Annotated[bool, option("--write", "Write the changed copy too.")] = False,
    output: Annotated[
        Path | None, option("--output PATH", "Where to write; default: SCRIPT with _mixtral appended to its name.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Report what changes in a script or notebook written for NeMo.

    Line by line: what is written differently (changed), taken with a warning (warned), refused with what replaces it
    (refused), or worth a look (note). Nothing of the script is run. In a copy a remark stands above what is refused.
    """
    from mixtral_recipes.errors import RecipeError
    from mixtral_recipes.settings.nemo import migrate
    from mixtral_recipes.system.files import sibling

    script = script if script.name else script.absolute()
    target = (output or sibling(script, f"{script.stem}_mixtral{script.suffix}")) if write or output else None
    if target is not None and target.exists() and not overwrite:
        raise RecipeError(f"{target} exists; choose another --output, or pass --overwrite.")
    written = target.resolve() if target is not None else None
    read, unread = [], []
    for path in migrate.scripts_in(script):
        if written in path.resolve().parents:
            continue
        try:
            read.append(migrate.migrate(path))
        except RecipeError as error:
            if not script.is_dir():
                raise
            unread.append(str(error))
            say(str(error))
    for found in read:
        for finding in found.findings:
            say(f"{found.path}:{finding.place}: {finding.kind:7}  {finding.text}")
    kinds = ("changed", "warned", "refused", "note")
    counts = {kind: sum(found.count(kind) for found in read) for kind in kinds}
    if target is not None:
        _write(script, target, read)
        note(f"Wrote {target}")
    told = ", ".join(f"{count} {'notes' if kind == 'note' and count != 1 else kind}" for kind, count in counts.items())
    note(f"{len(read)} file(s): {told}{f'; not read: {len(unread)}' if unread else ''}.")
    if json:
        files = [{"path": str(found.path), "findings": [vars(finding) for finding in found.findings]} for found in read]
        print_json({**counts, "files": files, "unread": unread, "written": str(target) if target else None})
    if unread:
        raise RecipeError(f"{len(unread)} file(s) could not be read (see the first lines).")
    if counts["refused"]:
        raise RecipeError(f"{counts['refused']} line(s) must be changed by hand: those marked refused.")


def _write(script: Path, target: Path, read: list[Any]) -> None:
    """Write one changed file, or a folder with everything in it; what is already in that folder stays."""
    from mixtral_recipes.system.files import copy_folder, replacing_folder, write_text

    if not script.is_dir():
        write_text(target, read[0].source)
        return
    with contextlib.nullcontext(target) if target.exists() else replacing_folder(target) as place:
        copy_folder(script, place, without=("__pycache__", ".git", target.resolve(), place.resolve()))
        for found in read:
            write_text(place / found.path.relative_to(script), found.source)
