"""Programs compiled for chips that are not there: memory, collectives, fits or not."""
