"""Advertisements to read, as users have them: alike, and no two the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_THINGS = """
oak table, mountain bike, bookshelf, leather sofa, electric piano, car seat, washing machine,
typewriter, pair of hiking boots, fridge freezer, cordless drill, set of garden chairs, guitar,
desk lamp, coffee machine, tent, rowing machine, sewing machine, record player, wool rug
"""
THINGS = tuple(thing.strip() for thing in _THINGS.split(","))
COLOURS = ("blue", "red", "black", "white", "green", "grey", "brown")
CONDITIONS = ("new", "like new", "used", "worn")
CITIES = ("Leeds", "Bristol", "York", "Oxford", "Dublin", "Bath", "Glasgow", "Norwich", "Derby")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack")
_FORMS = (
    "Selling my {colour} {thing}, {condition}, {price} euros. Pick up in {city}, ask for {name}.",
    "{thing} for sale in {city}, {colour}. Condition: {condition}. {price} euros. Call {name}.",
    "{name} from {city} sells a {thing}. It is {colour} and {condition}. Price: {price} euros.",
    "For sale: {thing} ({colour}), {condition}. {price} euros, {city}. Contact {name}.",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "maxLength": 40},
        "colour": {"type": "string", "maxLength": 20},
        "condition": {"enum": list(CONDITIONS)},
        "price": {"type": "integer", "minimum": 0, "maximum": 100000},
        "currency": {"enum": ["euros", "pounds"]},
        "city": {"type": "string", "maxLength": 20},
        "seller": {"type": "string", "maxLength": 20},
    },
    "required": ["item", "colour", "condition", "price", "currency", "city", "seller"],
    "additionalProperties": False,
}
TASK = "Read the advertisement and give its fields as JSON."


def ads(rng: np.random.Generator) -> Iterator[tuple[str, dict[str, str | int]]]:
    """Advertisements, and what each says; without end."""
    while True:
        said: dict[str, str | int] = {
            "thing": str(rng.choice(THINGS)),
            "colour": str(rng.choice(COLOURS)),
            "condition": str(rng.choice(CONDITIONS)),
            "price": int(rng.integers(10, 900)),
            "city": str(rng.choice(CITIES)),
            "name": str(rng.choice(NAMES)),
        }
        yield str(rng.choice(_FORMS)).format(**said), said
