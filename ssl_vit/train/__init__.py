"""From a recipe to a trained checkpoint: the Trainer, the run folder, the cost of a run, W&B."""
