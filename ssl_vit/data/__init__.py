"""Images from anywhere as RGB, the stream of global batches, and the views that are made of them."""
