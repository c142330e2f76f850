"""The training process of one attempt. It launches nothing."""
