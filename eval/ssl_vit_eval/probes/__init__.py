"""What is fitted on frozen features, on tokens or on images, and how its settings are chosen without a look at test."""
