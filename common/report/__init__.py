"""What a run leaves to look at: pages, tables, curves, figures."""
