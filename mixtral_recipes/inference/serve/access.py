"""Who may call: this machine alone, or those who have a token."""

import ipaddress
from pathlib import Path

from mixtral_recipes.errors import RecipeError


def read_token(file: Path | None, environment: str | None, host: str) -> str | None:
    """The token that clients must send.

    Args:
        file: A file that holds it.
        environment: What the environment says, where there is no file.
        host: The address that is served.

    Raises:
        RecipeError: the address is not this machine's own and there is no token, or the token is empty.
    """
    try:
        token = file.read_text(encoding="utf-8").strip() if file else environment
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--token-file {file}: cannot be read ({error}).") from error
    if token is not None and (not token or not token.isascii() or len(token.split()) != 1):
        raise RecipeError("the token must be a single word of ASCII characters.")
    if token is None and not is_loopback(host):
        raise RecipeError(
            f"--host {host} lets other machines connect, which needs a token: pass --token-file FILE, set "
            "MIXTRAL_RECIPES_TOKEN in the environment, or leave --host out."
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
