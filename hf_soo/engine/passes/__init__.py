"""What a forward or backward pass is of: a step of training or another purpose, tokens or padding."""
