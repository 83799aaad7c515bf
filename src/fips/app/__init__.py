"""What each subcommand does: models and data by name, tables, plots, comparisons, timings. Prints for people."""
