"""The labs: predictions committed before the measurement, what came of them, pictures."""
