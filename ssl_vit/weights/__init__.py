"""Files of weights: checkpoints, exports, and what the authors of DINO, MAE and DINOv2 published."""
