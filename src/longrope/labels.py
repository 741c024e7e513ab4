"""Labels of the extended model's rows in tables, plots and `results.json`."""

RESULT, WITHOUT = "longrope", "longrope without recovery"
