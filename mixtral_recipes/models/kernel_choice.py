"""What a configuration says of Transformer Engine's kernels, put into the environment variables that it reads.

It reads them when layers are built and at every forward pass, so they stay until the run that set them ends.
"""

import os

from megatron.core.transformer.enums import AttnBackend

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.models.config import MixtralConfig

_DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
_ATTENTION = {  # a kernel whose variable is 0 is not considered
    AttnBackend.flash: "NVTE_FLASH_ATTN",
    AttnBackend.fused: "NVTE_FUSED_ATTN",
    AttnBackend.unfused: "NVTE_UNFUSED_ATTN",
}
_FLASH_ATTENTION = {version: f"NVTE_FLASH_ATTN_V{version}" for version in (2, 3, 4)}
_before: dict[str, str | None] = {}


def apply(config: MixtralConfig) -> None:
    """Set the variables of a model, until `forget`; ``attention_backend=auto`` leaves the choice to the user's.

    Raises:
        EnvironmentProblem: the user's say the opposite of the configuration.
    """
    for name, value in _attention(config).items():
        given = _before.setdefault(name, os.environ.get(name))
        if given not in (None, "", value):
            raise EnvironmentProblem(
                f"{name}={given} is set in the environment, but model.config.attention_backend="
                f"{config.attention_backend.name} and flash_attention_version={config.flash_attention_version} need "
                f"{value}; unset it, or leave both settings out."
            )
        os.environ[name] = value
    if config.deterministic_mode:
        _before.setdefault(_DETERMINISM, os.environ.get(_DETERMINISM))
        os.environ[_DETERMINISM] = "0"


def _attention(config: MixtralConfig) -> dict[str, str]:
    wanted = config.attention_backend
    kernels = {name: str(int(kind is wanted)) for kind, name in _ATTENTION.items()} if wanted in _ATTENTION else {}
    version = config.flash_attention_version
    return kernels | {name: "0" for number, name in _FLASH_ATTENTION.items() if version not in (None, number)}


def forget() -> None:
    """Leave the choice to the next model of this process, as it was."""
    for name, given in _before.items():
        os.environ.pop(name, None)
        if given is not None:
            os.environ[name] = given
    _before.clear()
