"""How good a model is: fixed seeds, measures, intervals, and the guard."""
