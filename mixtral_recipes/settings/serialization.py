"""What nemo_run and fiddle must be taught before a recipe passes through them; importing this teaches them."""

import types

from fiddle.experimental import serialization
from nemo_run.cli.cli_parser import type_parser

from mixtral_recipes.settings.classes import DTYPES

# nemo_run sends recipes to its processes as fiddle JSON, which needs to know dtypes by name.
for _name in DTYPES:
    serialization.register_constant("torch", _name, compare_by_identity=False)

# nemo_run's parser of values knows Union[X, None] and not X | None.
type_parser.register_parser(types.UnionType)(type_parser.parse_union)  # pyright: ignore[reportArgumentType]
