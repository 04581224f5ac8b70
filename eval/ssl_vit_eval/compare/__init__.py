"""From rows to verdicts: what is compared, what is asked of it, by how much it differs, and what a reader must be warned of."""
