"""A grid of pretrainings: planned, checked for fairness, trained, evaluated and compared; what is finished is skipped."""
