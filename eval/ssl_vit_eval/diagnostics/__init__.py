"""What is in the tokens of a frozen backbone, measured without labels and written to files."""
