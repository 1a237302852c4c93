"""What was measured of a card, kept in the home folder and used by later plans.

A measurement replaces fields of the card (`measure.py`); a run corrects them by one factor for all of its time.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from mixtral_recipes.layout import cards
from mixtral_recipes.layout.cards import Card
from mixtral_recipes.system import home
from mixtral_recipes.system.files import read_json, write_json
from mixtral_recipes.system.schema import fits

_SPEEDS = ("bf16_tflops", "fp8_tflops", "memory_tbps", "link_gbps", "network_gbps")


def file() -> Path:
    """Where measurements are kept."""
    return home.home() / "planner" / "cards.json"


def kept() -> dict[str, dict[str, float]]:
    """Card -> measured fields; nothing where the file is absent or unreadable."""
    found = read_json(file()) or {}
    return found if fits(found, dict[str, dict[str, float]]) else {}


def corrected(card: Card) -> Card:
    """A card with what was measured of it."""
    found = kept().get(card.name, {})
    names = {field.name for field in dataclasses.fields(Card)}
    known: dict[str, Any] = {
        name: float(value)
        for name, value in found.items()
        if name in names and isinstance(value, int | float) and math.isfinite(value) and value > 0
    }
    return dataclasses.replace(card, **known)


def keep(name: str, fields: dict[str, float]) -> str:
    """Keep what was measured of a card; what to tell about it."""
    found = kept()
    found[name] = found.get(name, {}) | fields
    file().parent.mkdir(parents=True, exist_ok=True)
    write_json(file(), found)
    shown = ", ".join(f"{key} {value:.4g}" for key, value in fields.items())
    return f"{name}: {shown}; kept in {file()}"


def learn(name: str, predicted_seconds: float, measured_seconds: float) -> str:
    """Correct a card's speed by a step that was predicted and measured; what to tell about it.

    Args:
        name: The card.
        predicted_seconds: Of a step.
        measured_seconds: Of a step.
    """
    ratio = measured_seconds / predicted_seconds
    card = corrected(cards.card(name))
    fields: dict[str, float] = {one: getattr(card, one) / ratio for one in _SPEEDS if getattr(card, one) is not None}
    fields["launch_us"] = card.launch_us * ratio
    return f"measured {ratio:.2f} x the predicted time. {keep(name, fields)}"
