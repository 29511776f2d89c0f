"""Is it clean? Clean images are used here, to judge, and in training never but for what `logging.reference` shows of it."""
