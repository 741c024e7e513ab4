"""Names of the rows in tables, plots and `results.json`."""

RESULT, WITHOUT = "longrope", "longrope without recovery"
