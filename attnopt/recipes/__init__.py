"""Recipes: what is wanted of a model, in a YAML file that is read strictly.

A recipe says goals, what may be done where, and the data; it names no choices. Those are a plan's,
which a recipe and a model make together.
"""

from attnopt.recipes.builtin import builtin_text as builtin_text
from attnopt.recipes.builtin import names as names
from attnopt.recipes.recipe import Recipe as Recipe
from attnopt.recipes.recipe import read_recipe as read_recipe
from attnopt.recipes.recipe import recipe_of as recipe_of
from attnopt.recipes.recipe import recipe_text as recipe_text
