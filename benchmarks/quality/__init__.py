"""How well: losses of the recipe, ablations."""
