"""The data and the model that ship inside the package, named ``embedded://squad`` and ``embedded://mixtral_tiny``."""

from pathlib import Path

from mixtral_recipes.errors import DataError, nearest

PREFIX = "embedded://"
NAMES = ("mixtral_tiny", "squad")


def resolve(spec: str | Path) -> Path:
    """The folder (or file in it) that an ``embedded://`` name means; any other path is returned unchanged.

    Raises:
        DataError: no such embedded folder.
    """
    text = str(spec)
    if not text.startswith(PREFIX):
        return Path(spec)
    name, _, rest = text.removeprefix(PREFIX).strip("/").partition("/")
    if name not in NAMES:
        raise DataError(f"{text} is not in the package.{nearest(name, NAMES)}")
    return Path(__file__).parent / name / rest
