"""The one pass over the images, and the features and tokens that it leaves on disk."""
