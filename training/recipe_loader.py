"""How recipes' YAML is read; apart from `recipe.py`, which needs torch."""

import re

import yaml


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in YAML 1.2; PyYAML takes it for a string unless it has a dot."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
