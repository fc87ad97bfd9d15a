"""What runs beside a layer besides a low-rank pair: one file per family of parts, and a table."""
