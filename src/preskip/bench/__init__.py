"""What a branch costs at inference and in training, held against what its bytes and FLOPs make inevitable."""
