"""Attribution by gradients, at the input or along a path."""
