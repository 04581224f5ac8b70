"""The comparison shown: in the terminal, as HTML and Markdown with tables and plots, and in W&B."""
