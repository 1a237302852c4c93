"""Parameter-efficient fine-tuning. The schemes are settings (`settings/peft.py`); as in NeMo they are here too."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_recipes.settings.peft import PEFT_STR2CLS, DoRA, LoRA, QLoRA

__all__ = ["PEFT_STR2CLS", "DoRA", "LoRA", "QLoRA"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in __all__:
        from mixtral_recipes.settings import peft

        return getattr(peft, name)
    from mixtral_recipes.settings.nemo.modules import of_nemo

    return of_nemo(name)
